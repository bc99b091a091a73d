"""A merged network as a folder that explains itself and loads again without running anybody's code."""
