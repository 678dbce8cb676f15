"""One module a command; each builds its own parser when it is called, so that the others' libraries stay unloaded."""
