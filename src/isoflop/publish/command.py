"""The command `publish`: push a run, or print what would be pushed."""

from __future__ import annotations

from isoflop.publish.publishing import PublishResult, publish
from isoflop.utils.output import log_to_console
from isoflop.utils.tables import table


def publish_command(
    run: str,
    repo_id: str | None = None,
    private: bool | None = None,
    license: str | None = None,
    checkpoints: bool = False,
    dry_run: bool = False,
) -> int:
    """Push a run, or print what would be pushed; return the exit code."""
    log_to_console()
    result = publish(run, repo_id=repo_id, private=private, license=license, checkpoints=checkpoints, dry_run=dry_run)
    if dry_run:
        print(preview_text(result))
    return 0


def preview_text(result: PublishResult) -> str:
    """Return the files and the card of a dry run."""
    rows = [[f"{result.repo_id}, revision {tag}", "model files", ""] for tag in result.revisions]
    rows += [[f"{result.repo_id}/{file.path}", file.origin, f"{file.num_bytes:,}"] for file in result.files]
    return f"{table(['to', 'from', 'bytes'], rows)}\n\n{result.card or ''}\ndry run: nothing was sent, and nothing written"
