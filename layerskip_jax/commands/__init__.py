"""The commands of ``layerskip``: a module each, whose ``main`` parses, calls the package and prints."""
