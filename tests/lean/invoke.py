"""In the place of a package that paramiko imports if it is there, and needs for nothing of ours.

It takes a quarter of what starting a backup does; a test suite starts some thousands.
"""

raise ImportError
