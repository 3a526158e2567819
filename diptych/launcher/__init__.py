"""`trtllm-serve up`: workers and router of one disaggregated YAML file as processes of this machine."""

from diptych.launcher.command import run
from diptych.launcher.plan import Member, default_config, members
from diptych.launcher.supervisor import Supervisor

__all__ = ["Member", "Supervisor", "default_config", "members", "run"]
