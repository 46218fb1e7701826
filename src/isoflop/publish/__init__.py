"""Publish: a run becomes a repository on the Hub, with a model card made from the run's own files.

Entered by `command.publish` (scripts/publish.py) for a finished run, by `checkpoints.publish_checkpoints` while one is training,
and by `upload.check_hub` before it starts. What is published names neither the machine nor its folders.
"""
