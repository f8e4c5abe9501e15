"""The commands of ``layerskip``: one module per command, whose ``main`` parses, calls the package and prints."""
