"""Publishing: a run becomes a repository on the Hugging Face Hub, with a model card made from the run's files.

Entered by `isoflop.publish(...)` and `command.publish_command` for a run, by `background.BackgroundPush` for the checkpoints of a
run in training, and by `upload.check_hub` before a run starts. What is published names neither the machine nor its folders.
"""

from isoflop.utils.callable_package import make_callable

make_callable(__name__, "isoflop.publish.publishing")
