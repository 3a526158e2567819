"""trtllm-llmapi-launch as job scripts call it."""

import subprocess
import sys

import pytest

from diptych.llmapi_launch import launch

COMMAND = [sys.executable, "-c", "import sys; print('served', *sys.argv[1:]); sys.exit(7)", "--tp_size", "2"]


@pytest.mark.parametrize("variables", [{}, {"SLURM_PROCID": "0", "SLURM_NNODES": "1"}, {"PMI_RANK": "0"}])
def test_the_first_task_becomes_the_command(variables):
    run = subprocess.run(
        [sys.executable, "-m", "diptych.llmapi_launch", *COMMAND],
        env=variables,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (run.returncode, run.stdout) == (7, "served --tp_size 2\n"), run.stderr


@pytest.mark.parametrize("variable", ["SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMI_ID"])
def test_other_tasks_end_at_once(variable):
    assert launch(["no such program"], {variable: "3"}) == 0


@pytest.mark.parametrize(
    ("command", "variables", "expected"),
    [
        ([], {}, "usage: trtllm-llmapi-launch COMMAND"),
        (["x"], {"SLURM_NNODES": "2", "SLURM_PROCID": "0"}, "the job has 2 nodes"),
        (["no such program"], {}, "there is no program no such program"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(command, variables, expected, capsys):
    assert launch(command, variables) == 2
    assert expected in capsys.readouterr().err
