"""A recipe as a job on a Ray cluster that is reached over HTTP: what is sent, under which id, and how it is followed."""
