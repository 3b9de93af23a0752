"""The workspace: a folder, or a folder with an object store behind it; leases on what only one may do."""
