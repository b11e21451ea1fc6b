"""Test the collector: a rank's share of the prompts, and feedback of the data next to the verifier's."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from samples import make_sample
from tiny import save_folder

from megatron_srpo.config.base import ConfigError
from megatron_srpo.config.rollout_section import RolloutSection
from megatron_srpo.config.task_section import TaskSection
from megatron_srpo.data.records import Prompt
from megatron_srpo.distributed.heartbeat import PROGRESS
from megatron_srpo.model.hf_folder import HFFolder
from megatron_srpo.rollout.collect import Collector
from megatron_srpo.tasks.pool import Job, Pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return HFFolder(save_folder(tmp_path_factory.mktemp("hf")))


def prompt(number):
    return Prompt(
        id=f"t/{number}", task="t", messages=({"role": "user", "content": "x" * number},), answer=str(number)
    )


def test_ranks_share_the_prompts(folder):
    shares = []
    for rank in range(3):
        layout = SimpleNamespace(rank=rank, world_size=3)
        collector = Collector(None, None, folder, layout, RolloutSection())
        shares.append([one.id for one in collector.prompts(prompt, range(10, 18))])
    assert shares == [["t/10", "t/13", "t/16"], ["t/11", "t/14", "t/17"], ["t/12", "t/15"]]
    collector = Collector(
        None, None, folder, SimpleNamespace(rank=0, world_size=1), RolloutSection(max_prompt_tokens=40)
    )
    with pytest.raises(ConfigError, match="prompt t/30 has"):
        collector.prompts(prompt, range(30, 31))


def test_feedback_of_the_data_is_for_failed_samples():
    verifiers = Pool({"made-up": "megatron_srpo.tasks.sciknoweval:verify"}, TaskSection(verifier_workers=1))
    collector = Collector(verifiers, None, None, None, RolloutSection())

    def judged(text, feedback):
        sample = make_sample(text=text)
        sample = sample.model_copy(
            update={"prompt": sample.prompt.model_copy(update={"answer": "B", "feedback": feedback})}
        )
        ((result,),) = collector.verify([(sample,)])
        return result.verdict

    assert judged("<answer>A</answer>", "it was B").feedback == "it was B"
    assert judged("<answer>A</answer>", None).feedback == "Your answer is wrong."
    assert judged("<answer>B</answer>", "it was B").feedback is None


def test_every_verdict_is_progress_also_that_of_a_response_that_hangs(tmp_path):
    # The watchdog ended runs whose verdicts took long: verification was no progress.
    file = tmp_path / "slow.py"
    file.write_text("import time\n\n\ndef verify(answer, text):\n    time.sleep(60)\n")
    settings = TaskSection(verifier_workers=1, verifier_seconds=0.3)
    pool = Pool({"slow": f"{file}:verify"}, settings)
    before = PROGRESS.beats
    verdicts = pool.verify([Job("slow", "", "")] * 4)
    pool.close()
    assert [verdict.verifier_failed for verdict in verdicts] == ["timeout"] * 4
    assert PROGRESS.beats - before >= 4
