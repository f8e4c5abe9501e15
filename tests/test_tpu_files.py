"""The scripts, pinned versions, manifest, image and README in tpu/."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import stand_in_cloud
import yaml
from packaging.requirements import Requirement
from stand_in_cloud import ROOT

templates, cloud = stand_in_cloud.templates, stand_in_cloud.cloud


def test_shellcheck_finds_nothing():
    scripts = str(Path(sys.executable).parent)
    shellcheck = shutil.which("shellcheck", path=os.pathsep.join([scripts, os.environ["PATH"]]))
    assert shellcheck, "install the dev extra: pip install -e '.[dev]'"
    files = ["tpu/pod", "tpu/worker.sh", ".ci/run"]
    run = subprocess.run([shellcheck, "-x", "-a", *files], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout


def test_scripts_use_only_features_of_bash_3_2():
    for file in ("tpu/pod", "tpu/common.sh"):
        text = (ROOT / file).read_text()
        for newer in (r"\bmapfile\b", r"\bdeclare -A", r"\$\{\w+(\^\^|,,|@Q)", r"\bwait -n", r"&>>", r"\|&"):
            assert not re.search(newer, text), (file, newer)


def pins():
    lines = (ROOT / "tpu/requirements.txt").read_text().splitlines()
    requirements = [Requirement(line) for line in lines if not line.startswith("#")]
    return {requirement.name: requirement.specifier for requirement in requirements}


PINS = pins()


def test_every_pin_is_an_exact_version():
    assert set(PINS) == {"flax", "jax", "jaxlib", "libtpu"}
    for name, specifier in PINS.items():
        (version,) = specifier
        assert version.operator == "==", name
        assert "*" not in version.version, name
    assert str(PINS["jax"]) == str(PINS["jaxlib"])


def test_the_ranges_of_pyproject_admit_the_pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["tpu"]]
    ranges = [requirement for requirement in map(Requirement, lines) if requirement.name in PINS]
    assert {"jax", "flax"} <= {requirement.name for requirement in ranges}
    for requirement in ranges:
        (pin,) = PINS[requirement.name]
        assert requirement.specifier.contains(pin.version), f"{requirement} does not admit {pin.version}"


@pytest.mark.parametrize("file", ["tpu/worker.sh", "tpu/Dockerfile"])
def test_every_installation_uses_the_pins_and_the_same_python(file):
    text = (ROOT / file).read_text().replace("\\\n", " ")
    (command,) = [line for line in text.splitlines() if "[tpu]" in line]
    assert re.search(r"--constraint \S*tpu/requirements\.txt", command)
    assert re.findall(r"(?:--python |FROM python:)(3\.\d+)", text) == ["3.12"]


def test_the_jobset_has_what_a_multislice_run_needs():
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


def test_the_image_copies_the_pins_before_it_installs():
    text = (ROOT / "tpu/Dockerfile").read_text()
    assert text.index("COPY tpu/requirements.txt tpu/requirements.txt") < text.index("RUN pip install")


def test_the_readme_and_create_agree_on_runtime_versions(cloud):
    page = (ROOT / "tpu/README.md").read_text()
    rows = re.findall(r"^ *\| (`.*?-N`.*?) \|.*\| `(.*?)` \|$", page, flags=re.MULTILINE)
    names = {name: runtime for types, runtime in rows for name in re.findall(r"`(\w+)-N`", types)}
    assert set(names) == {"v6e", "v5p", "v5litepod", "v4", "v3", "v2", "tpu7x"}
    for name, runtime in names.items():
        assert f"--version={runtime}\n" in cloud.pod("create", "--dry-run", f"--accelerator={name}-8")


def test_the_commands_of_the_readme_run(cloud):
    page = (ROOT / "tpu/README.md").read_text()
    for config in set(re.findall(r"--config (\S+)", page)):
        (cloud.repository / config).write_text("")
    commands = re.findall(r"^ {4}(tpu/pod .*)$", page, flags=re.MULTILINE)
    shown = {words.split()[1] for words in commands}
    assert shown >= {"create", "status", "install", "launch", "logs", "stop", "watch", "delete"}
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        words = words if "--dry-run" in words or words == ["help"] else [words[0], "--dry-run", *words[1:]]
        cloud.pod(*words)
