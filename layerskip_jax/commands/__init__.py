"""What the top-level scripts and the installed commands call: parse, call the package, print."""
