"""`trtllm-llmapi-launch COMMAND ...`: what files written for MPI put before `trtllm-serve`.

A worker here starts the processes of its ranks itself, on one host. So of the tasks that srun or mpirun start there,
the first one becomes COMMAND and the others end at once.
"""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence

_RANKS = ("SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMI_ID")
_NODES = ("SLURM_STEP_NUM_NODES", "SLURM_NNODES")


def main() -> None:
    sys.exit(launch(sys.argv[1:], os.environ))


def launch(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Becomes the command, or the exit code when it does not."""
    if not command:
        return _refuse("usage: trtllm-llmapi-launch COMMAND [ARGUMENT ...]")
    nodes = next((environment[name] for name in _NODES if name in environment), "1")
    if nodes != "1":
        return _refuse(
            f"error: the job has {nodes} nodes, and the ranks of a worker must be on one: start a worker on each node"
        )
    if next((environment[name] for name in _RANKS if name in environment), "0") != "0":
        return 0
    program = shutil.which(command[0])
    if program is not None:
        os.execv(program, list(command))
    return _refuse(f"error: there is no program {command[0]}")


def _refuse(sentence: str) -> int:
    sys.stderr.write(f"{sentence}\n")
    return 2


if __name__ == "__main__":
    main()
