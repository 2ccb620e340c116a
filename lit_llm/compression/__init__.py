"""Mathematics on a network, plain torch, that makes it smaller. Callbacks say when, commands in what order."""
