"""The first minutes on a GPU: first.sh tests what only a GPU can show, second.sh times what nothing has timed yet."""
