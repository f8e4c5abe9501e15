"""The scripts, the manifest, the image and the page in tpu/, as they stand."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import stand_in_cloud
import yaml
from stand_in_cloud import ROOT

templates, cloud = stand_in_cloud.templates, stand_in_cloud.cloud


def test_shellcheck_finds_nothing():
    beside = str(Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([beside, os.environ["PATH"]]))
    assert shellcheck, "the dev extra brings it: pip install -e '.[dev]'"
    files = ["tpu/pod", "tpu/worker.sh", ".ci/run"]
    run = subprocess.run([shellcheck, "-x", "-a", *files], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_scripts_keep_to_what_bash_3_2_knows():
    for file in ("tpu/pod", "tpu/common.sh"):
        text = (ROOT / file).read_text()
        for newer in (r"\bmapfile\b", r"\bdeclare -A", r"\$\{\w+(\^\^|,,|@Q)", r"\bwait -n", r"&>>", r"\|&"):
            assert not re.search(newer, text), (file, newer)


def test_the_jobset_says_what_a_multislice_run_needs():
    jobset = yaml.safe_load((ROOT / "tpu/jobset.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    exclusive = jobset["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
    assert exclusive == "cloud.google.com/gke-nodepool"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (slices,) = jobset["spec"]["replicatedJobs"]
    job = slices["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert slices["replicas"] == 2
    assert job["parallelism"] == job["completions"]
    assert job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    chips = 1
    for side in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"):
        chips *= int(side)
    assert container["resources"]["limits"] == container["resources"]["requests"]
    assert chips == job["parallelism"] * container["resources"]["limits"]["google.com/tpu"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    spot = {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
    assert spot in pod["tolerations"]
    assert container["args"][container["args"].index("--train.run_dir") + 1].startswith("gs://")
    assert (ROOT / container["args"][container["args"].index("--config") + 1]).is_file()


def test_the_image_has_what_it_copies():
    lines = (ROOT / "tpu/Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
    assert 'ENTRYPOINT ["python", "train.py"]' in lines


def test_the_commands_of_the_page_are_commands(cloud):
    page = (ROOT / "tpu/README.md").read_text()
    (cloud.repository / "configs/quickstart.py").write_text("")
    commands = re.findall(r"^ {4}(tpu/pod .*)$", page, flags=re.MULTILINE)
    shown = {words.split()[1] for words in commands}
    assert shown >= {"create", "status", "install", "launch", "logs", "stop", "watch", "delete"}
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        words = words if "--dry-run" in words or words == ["help"] else [words[0], "--dry-run", *words[1:]]
        cloud.pod(*words)
