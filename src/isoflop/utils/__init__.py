"""Helpers of all other packages.

errors            UserError: what the user can fix
untrusted         reads files of unknown origin, limited in size
io                checksums, atomic writes, locks, checks of who wrote a folder
credentials       finds and hides credentials in text
output            standard output and error, and the console of the package's log
tables            tables as text; html in notebooks
command           runs a verb: errors and exit codes
callable_package  packages that can be called
"""
