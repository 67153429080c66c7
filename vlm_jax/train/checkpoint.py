"""Checkpoints: the state and the place in the data as one unit, through Orbax."""

import logging
from pathlib import Path

import orbax.checkpoint as ocp

from vlm_jax.config import Train
from vlm_jax.structs import State


class Checkpoints:
    """The last `keep_checkpoints` of a run. A step's folder gets its name when it is complete, never before."""

    def __init__(self, path: Path, cfg: Train):
        logging.getLogger("absl").setLevel(logging.ERROR)
        options = ocp.CheckpointManagerOptions(max_to_keep=cfg.keep_checkpoints, create=True)
        self._manager = ocp.CheckpointManager(path.resolve(), options=options)
        self._damaged: set[int] = set()  # kept until a whole one of the same step takes its place

    def save(self, step: int, state: State, data_state: dict) -> None:
        """Returns while the files are still being written; `close` waits for them."""
        if step in self._damaged:
            self._manager.delete(step)
            self._damaged.remove(step)
        if step in self._manager.all_steps():
            return
        arguments = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_state))
        self._manager.save(step, args=arguments)

    def restore(self, like: State) -> tuple[State, dict] | None:
        """The last whole checkpoint, laid out as `like` (shapes with shardings), or None where there is none.

        One that cannot be read is named, and the one before it is taken.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            arguments = ocp.args.Composite(state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore())
            try:
                restored = self._manager.restore(step, args=arguments)
            except Exception as error:  # whatever a damaged file makes the readers raise
                reason = str(error).strip().splitlines() or [type(error).__name__]
                print(f"checkpoint {step} is not whole and is passed over ({reason[0][:200]})", flush=True)
                self._damaged.add(step)
                continue
            return restored["state"], restored["data"]
        return None

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
