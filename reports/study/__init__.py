"""How the records of a study are read, checked and put into words."""
