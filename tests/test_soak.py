"A short run of what `rvos bench soak` does at length."

import pytest

from rvos_nb.bench.soak import judge_stage, soak


@pytest.mark.timeout(600)
def test_a_short_run_leaves_nothing_open(tmp_path):
    stages, looks = soak(tmp_path, videos=40)
    assert set(stages) == {"predict", "propagate", "fuse"}
    for name, events in stages.items():
        assert sum(e["event"] == "done" for e in events) >= 40
        assert not [e for e in events if e["event"] == "failed"]
        growth = {f.name.split(".")[-1]: f for f in judge_stage(name, events, looks)}
        assert growth["open_files_growth"].ok, growth
        assert growth["memory_growth"].ok, growth
    assert looks[-1].files <= looks[0].files + 4
