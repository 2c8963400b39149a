"""Pictures and curves of a run, as files and on a visdom server."""
