"""The workspace on storage that nobody mounts: S3 or any other file system that fsspec knows, with a folder of this node
in front of it.

`objects` is the door to fsspec, `leases` keep two runs apart, `mirror` carries unfinished work to the store while it is
being done, `nodes` lets other nodes work on it, `workspace` is what the pipeline sees of it all.
"""
