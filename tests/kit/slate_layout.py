"""Where things are in a slate: see proxyd/relay/slate_types.pxd."""

PAGE = 4096
SLOT_SIZE = 1024
