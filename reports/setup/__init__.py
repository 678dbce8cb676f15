"""How the runs were made: methods and settings, the protocol, what was checked to agree, machines, commands."""
