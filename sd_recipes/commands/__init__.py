"""One file a command; they alone know all the other rooms."""
