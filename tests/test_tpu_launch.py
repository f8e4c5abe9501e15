"""tpu/pod with a stand-in gcloud, which checks its arguments strictly and runs the commands sent to the workers."""

import re
import shlex
import shutil
import subprocess

import pytest
import stand_in_cloud
from stand_in_cloud import ROOT, TRAIN, Cloud

templates, cloud, installed = stand_in_cloud.templates, stand_in_cloud.cloud, stand_in_cloud.installed
PLACE = ["--project=my-project", "--zone=us-east5-b"]

# --- creating and deleting --------------------------------------------------------------------------------------------

RUNTIMES = {
    "v6e-64": "v2-alpha-tpuv6e",
    "v5p-128": "v2-alpha-tpuv5",
    "v5litepod-16": "v2-alpha-tpuv5-lite",
    "v4-32": "tpu-ubuntu2204-base",
    "tpu7x-16": "v2-alpha-tpu7-ubuntu2404",
}


@pytest.mark.parametrize(("accelerator", "runtime"), RUNTIMES.items())
def test_create_chooses_the_runtime_version(cloud, accelerator, runtime):
    cloud.pod("create", "--accelerator", accelerator)
    (call,) = cloud.calls()
    words = ["my-run", *PLACE, f"--accelerator-type={accelerator}", f"--version={runtime}"]
    assert call == ["compute", "tpus", "tpu-vm", "create", *words]


@pytest.mark.parametrize(
    ("options", "command", "more"),
    [
        (["--spot"], "tpu-vm", ["--version=v2-alpha-tpuv6e", "--spot"]),
        (["--runtime=other"], "tpu-vm", ["--version=other"]),
        (["--queued"], "queued-resources", ["--runtime-version=v2-alpha-tpuv6e", "--node-id=my-run"]),
        (
            ["--slices", "3", "--spot"],
            "queued-resources",
            ["--runtime-version=v2-alpha-tpuv6e", "--node-count=3", "--node-prefix=my-run", "--spot"],
        ),
    ],
)
def test_create_spot_queued_and_many_slices(cloud, options, command, more):
    cloud.pod("create", *options)
    (call,) = cloud.calls()
    assert call == ["compute", "tpus", command, "create", "my-run", *PLACE, "--accelerator-type=v6e-16", *more]


@pytest.mark.parametrize(
    ("options", "variable", "alpha", "more"),
    [
        ("--flex-start=24h", "POD_FLEX_START", True, ["--provisioning-model=flex-start", "--max-run-duration=24h"]),
        ("--reservation=mine", "POD_RESERVATION", True, ["--reservation=mine"]),
        ("--reservation=any", "POD_RESERVATION", False, ["--reserved"]),
    ],
)
def test_create_flex_start_and_reserved(cloud, options, variable, alpha, more):
    cloud.pod("create", options)
    (call,) = cloud.calls()
    words = ["--accelerator-type=v6e-16", "--runtime-version=v2-alpha-tpuv6e", "--node-id=my-run", *more]
    group = ["alpha"] * alpha + ["compute", "tpus", "queued-resources"]
    assert call == [*group, "create", "my-run", *PLACE, *words]
    assert cloud.pod("status", **{variable: options.partition("=")[2]}) == "my-run: PROVISIONING\n"


def test_create_warns_that_ironwood_may_be_refused(cloud):
    warning = "Google offers tpu7x through GKE and Compute Engine, so this request may fail: see tpu/README.md"
    assert warning in cloud.pod("create", "--accelerator=tpu7x-8")
    assert warning not in cloud.pod("create", "--accelerator=v5p-8", "--name=other")


def test_a_flag_overrides_its_variable(cloud):
    cloud.pod("create", "--zone=europe-west4-a", POD_SPOT="1")
    (call,) = cloud.calls()
    assert {"--zone=europe-west4-a", "--spot"} <= set(call)


def test_delete_asks_for_confirmation_unless_yes_is_given(cloud):
    cloud.pod("create")
    assert "--quiet" not in shlex.split(cloud.pod("delete", "--dry-run"))
    cloud.pod("delete", "--yes")
    assert cloud.state["nodes"] == {}
    cloud.pod("create", "--queued")
    cloud.pod("delete", "--queued", "--yes")
    assert cloud.calls()[-1][2:] == ["queued-resources", "delete", "my-run", *PLACE, "--force", "--quiet"]


def test_status_before_create_until_a_run(cloud):
    assert cloud.pod("status") == "my-run: does not exist\n"
    cloud.pod("create", "--queued")
    assert cloud.pod("status", "--queued") == "my-run: PROVISIONING\n"
    assert cloud.pod("status", "--queued") == "my-run: READY\n" + 2 * "state: absent\n"
    cloud.pod("install")
    assert "state: idle" in cloud.pod("status")
    cloud.pod("launch", *TRAIN)
    assert "state: running" in cloud.pod("status")
    cloud.preempt()
    assert cloud.pod("status") == "my-run: PREEMPTED\n"


def test_a_queued_resource_is_ready_only_with_all_its_slices(cloud):
    cloud.pod("create", "--slices=2")
    for _ in range(2):
        output = cloud.pod("status", "--slices=2")
    assert output == "my-run: READY\n" + 4 * "state: absent\n"
    cloud.preempt("my-run-1")
    assert cloud.pod("status", "--slices=2") == "my-run: PREEMPTED\n"


# --- installing -------------------------------------------------------------------------------------------------------


def test_install_copies_the_working_tree_to_all_workers(cloud):
    (cloud.repository / "configs/new.py").write_text("new")  # untracked
    (cloud.repository / "configs/gone.py").write_text("")
    cloud.git("add", "configs/gone.py")
    (cloud.repository / "configs/gone.py").unlink()
    (cloud.repository / "pyproject.toml").write_text("changed")
    before = cloud.git("status", "--porcelain")
    cloud.pod("create")
    cloud.pod("install")
    assert cloud.git("status", "--porcelain") == before
    assert len(cloud.homes()) == 2
    for home in cloud.homes():
        code = home / "layerskip_jax"
        assert (code / "configs/new.py").read_text() == "new"
        assert not (code / "configs/gone.py").exists()
        assert (code / "pyproject.toml").read_text() == "changed"
        assert not (code / "build").exists()


def test_a_second_install_replaces_the_code_and_keeps_the_files_of_the_run(installed):
    for home in installed.homes():
        (home / "layerskip_jax/runs").mkdir()
        assert (home / "layerskip_jax/configs/some.py").exists()
    (installed.repository / "train.py").write_text("print(1)")
    (installed.repository / "configs/some.py").unlink()
    installed.pod("install")
    for home in installed.homes():
        assert (home / "layerskip_jax/train.py").read_text() == "print(1)"
        assert (home / "layerskip_jax/runs").exists()
        assert not (home / "layerskip_jax/configs/some.py").exists()


def test_install_that_fails_on_one_worker(cloud):
    cloud.pod("create")
    cloud.fault("ssh", "Connection refused", status=255, worker=1)
    output = cloud.pod("install", status=1)
    assert "Connection refused" in output
    assert "worker 1 failed with exit status 255" in output
    assert output.endswith("error: my-run: could not install on every worker: see the messages above\n")


def test_install_needs_a_git_checkout_and_no_run(installed):
    installed.pod("launch", *TRAIN)
    assert "could not install on every worker" in installed.refused("install", status=1)
    shutil.rmtree(installed.repository / ".git")
    assert "is not a git checkout" in installed.refused("install", status=1)


# --- launching --------------------------------------------------------------------------------------------------------

AWKWARD = [
    "--train.sample_prompt",
    """it's a "prompt" with $HOME `date` \\ ! * ; & and  two  spaces""",
    "--data.name=",
    "--x",
    "",
    "é\nline",
]


@pytest.mark.parametrize("slices", [1, 2])
def test_launch_passes_every_option_unchanged(cloud, slices):
    cloud.pod("create", "--queued", f"--slices={slices}")
    for _ in range(2):
        cloud.pod("status", "--queued", f"--slices={slices}")
    cloud.pod("install", f"--slices={slices}")
    cloud.pod("launch", f"--slices={slices}", *TRAIN, *AWKWARD)
    cloud.wait_for("*/*/options.json", 2 * slices)
    assert cloud.options() == 2 * slices * [[*TRAIN[1:], *AWKWARD]]


def test_launch_is_refused_everywhere_while_one_worker_runs(installed):
    installed.fault("ssh", "Connection reset", status=1, worker=1)
    installed.pod("launch", *TRAIN, status=1)  # checks all workers first: nothing is started
    assert list(installed.folder.glob("*/*/layerskip_jax_run/pid")) == []
    installed.pod("launch", *TRAIN)
    one, other = installed.wait_for("*/*/options.json", 2)
    other.unlink()
    installed.kill_runs(worker="worker-1")
    installed.wait_for("*/worker-1/layerskip_jax_run/exit", 1)
    output = installed.pod("launch", *TRAIN, status=1)
    assert re.search(r"a run is active on this worker \(process \d+\): stop it with tpu/pod stop", output)
    assert "nothing was launched" in output
    assert one.exists()
    assert not other.exists()


def test_launch_before_install(cloud):
    cloud.pod("create")
    assert "nothing was launched" in cloud.refused("launch", *TRAIN, status=1)


@pytest.mark.parametrize("accelerator", ["v6e-8", "v5p-8", "tpu7x-8"])
def test_a_single_host_may_write_to_its_disk(installed, accelerator):
    options = ["--config=configs/some.py", "--train.run_dir=runs/mine"]
    installed.pod("launch", f"--accelerator={accelerator}", "--", *options)
    installed.wait_for("*/*/options.json", 2)


@pytest.mark.parametrize("text", ['run_dir="gs://bucket/run"', "run_dir = 'gs://bucket/run'"])
def test_the_config_may_name_the_bucket(cloud, text):
    (cloud.repository / "configs/some.py").write_text(text)
    cloud.pod("launch", "--dry-run", *TRAIN[:3])


def test_the_bucket_of_a_shipped_config_is_a_placeholder(cloud):
    (cloud.repository / "configs/some.py").write_text('run_dir="gs://your-bucket/run"')
    assert "set --train.run_dir to a gs:// folder" in cloud.refused("launch", "--dry-run", *TRAIN[:3])


MISTAKES = [
    (["create"], {"POD_NAME": ""}, "no name: set --name or POD_NAME, for example --name my-run"),
    (["create"], {"POD_PROJECT": ""}, "no project: set --project or POD_PROJECT to"),
    (["create"], {"POD_ZONE": ""}, "no zone: set --zone or POD_ZONE, for example --zone us-east5-b"),
    (["create"], {"POD_ACCELERATOR": ""}, "no accelerator type: set --accelerator or POD_ACCELERATOR, for example"),
    (["create", "--accelerator", "v6e"], {}, "must look like v6e-16, v5p-128, v5litepod-16 or tpu7x-16, got 'v6e'"),
    (["create", "--accelerator", "v9-8"], {}, "no runtime version is known for v9-8: set --runtime"),
    (["create", "--accelerator", "v7x-8"], {}, "the accelerator type of Ironwood is tpu7x-N, got 'v7x-8'"),
    (["create", "--name", "My run"], {}, "--name must be lowercase letters, digits and dashes"),
    (["create", "--slices", "two"], {}, "--slices must be a whole number, got 'two'"),
    (["create", "--slices", "0"], {}, "--slices must be at least 1, got 0"),
    (["create"], {"POD_SPOT": "yes"}, "POD_SPOT must be 0 or 1, got 'yes'"),
    (["create", "--spot", "--flex-start=4h"], {}, "use only one of --spot, --flex-start and --reservation"),
    (["create", "--reservation=any"], {"POD_FLEX_START": "4h"}, "use only one of --spot, --flex-start and"),
    (["create", "--flex-start", "4"], {}, "--flex-start must be a time such as 24h, 90m or 7d, got '4'"),
    (["create", "--zone"], {}, "--zone needs a value: --zone VALUE"),
    (["create", "--zome=x"], {}, "unknown option --zome=x: tpu/pod help lists the options"),
    (["create", *TRAIN], {}, "tpu/pod create takes no train options, got: --config"),
    (["crate"], {}, "unknown command 'crate': tpu/pod help lists the commands"),
    ([], {}, "no command: tpu/pod help lists the commands"),
    (["launch", "--config", "configs/some.py"], {}, "--config is an option of train.py: put it after --"),
    (["launch", "--train.steps=3"], {}, "--train.steps=3 is an option of train.py: put it after --"),
    (["launch"], {}, "no config: add the train options after --"),
    (["watch"], {}, "no config: add the train options after --"),
    (["launch", "--", "--config", "configs/none.py"], {}, "config 'configs/none.py' does not exist in "),
    (["launch", "--", "--config", "/etc/some.py"], {}, "--config must be a path inside the repository"),
    (["launch", *TRAIN[:3]], {}, "v6e-16 x 1 has more than one host: set --train.run_dir to a gs:// folder"),
    (["launch", "--accelerator=v6e-8", "--slices=2", *TRAIN[:3]], {}, "v6e-8 x 2 has more than one host"),
    (["launch", "--accelerator=tpu7x-16", *TRAIN[:3]], {}, "tpu7x-16 x 1 has more than one host"),
    (
        ["launch", *TRAIN, "--train.run_dir=runs/mine"],
        {},
        "--train.run_dir must be a gs:// folder when there is more than one host, got 'runs/mine'",
    ),
]


@pytest.mark.parametrize(("words", "environment", "message"), MISTAKES)
def test_a_usage_error_is_one_line_and_calls_nothing(templates, words, environment, message):
    cloud = Cloud(templates[0])  # without a copy, because a mistake changes nothing
    assert message in cloud.refused(*words, **environment)
    assert cloud.calls() == []


def test_without_gcloud(cloud):
    environment = {"PATH": "/usr/bin:/bin"} if not shutil.which("gcloud", path="/usr/bin:/bin") else None
    if environment is None:
        tools = cloud.folder / "tools"
        tools.mkdir()
        for tool in ("bash", "dirname", "env"):
            (tools / tool).symlink_to(shutil.which(tool))
        environment = {"PATH": str(tools)}
    assert "gcloud is not on the PATH: install the Google Cloud CLI" in cloud.refused("create", status=1, **environment)
    assert cloud.pod("create", "--dry-run", **environment).startswith("gcloud compute tpus tpu-vm create my-run ")


def test_help_names_every_command_and_option(cloud):
    text = cloud.pod("help")
    source = (ROOT / "tpu/common.sh").read_text()
    for option in re.findall(r"--[a-z-]+", source[source.index("read_options()") : source.index("whole_number()")]):
        assert option in (*text.split(), "--config"), option
    for variable in set(re.findall(r"POD_[A-Z_]+", source)):
        assert variable in text, variable


# --- following and stopping -------------------------------------------------------------------------------------------


def test_logs_follow_the_chosen_worker(installed):
    assert "there is no log yet" in installed.pod("logs", status=1)
    installed.pod("launch", *TRAIN)
    installed.wait_for("*/*/options.json", 2)
    process = installed.start("logs", "--worker=1")
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
    finally:
        tails = subprocess.run(["pgrep", "-f", f"tail -n 100 -F {installed.folder}"], capture_output=True, text=True)
        for pid in tails.stdout.split():
            subprocess.run(["kill", pid], check=False)
        process.communicate(timeout=20)
    assert "python train.py --config configs/some.py --train.run_dir gs://bucket/run" in lines[0]
    assert lines[1] == "step 1\n"
    assert "--worker=1" in installed.calls()[-1]


def test_stop_lets_the_run_save(installed):
    installed.pod("launch", *TRAIN)
    installed.wait_for("*/*/options.json", 2)
    assert installed.pod("stop").count("stopped") == 2
    assert [(home / "saved").exists() for home in installed.homes()] == [True, True]
    assert installed.pod("status") == "my-run: READY\n" + 2 * "state: stopped\n"
    assert installed.pod("stop").count("no run is active") == 2
    installed.pod("launch", *TRAIN)  # it can be launched again
    assert "state: running" in installed.pod("status")


def test_stop_is_remembered_when_no_run_is_active(installed):
    """For example between a failure and the next launch by `watch`."""
    for home in installed.homes():
        (home / "layerskip_jax_run").mkdir(exist_ok=True)
        (home / "layerskip_jax_run" / "exit").write_text("1\n")
    assert installed.pod("stop").count("no run is active") == 2
    assert installed.pod("status") == "my-run: READY\n" + 2 * "state: stopped\n"
    for home in installed.homes():
        (home / "layerskip_jax_run" / "stopped").unlink()
        (home / "layerskip_jax_run" / "exit").write_text("0\n")
    installed.pod("stop")  # keeps the state of a run that ended with status 0
    assert installed.pod("status") == "my-run: READY\n" + 2 * "state: ended 0\n"


def test_stop_kills_a_run_that_does_not_end(installed):
    installed.write("stubborn")
    installed.pod("launch", *TRAIN)
    installed.wait_for("*/*/options.json", 2)
    output = installed.pod("stop", "--grace", "1")
    assert output.count("killed: still running 1 s after SIGTERM, so its last steps may not be saved") == 2
    assert "running" not in installed.pod("status")


def test_another_process_with_a_stale_pid_is_not_the_run(installed):
    other = subprocess.Popen(["sleep", "60"])
    installed.write("layerskip_jax_run/pid", str(other.pid))
    assert installed.pod("status").count("state: lost") == 2
    assert installed.pod("stop").count("no run is active") == 2
    assert other.poll() is None
    other.kill()
    other.wait()


# --- dry run ----------------------------------------------------------------------------------------------------------

DRY = {
    "create": ["create", "--spot"],
    "queued": ["create", "--slices=2"],
    "flex-start": ["create", "--flex-start=4h"],
    "status": ["status"],
    "install": ["install"],
    "launch": ["launch", *TRAIN, *AWKWARD],
    "stop": ["stop", "--grace=7"],
    "delete": ["delete", "--yes"],
}


@pytest.mark.parametrize("words", DRY.values(), ids=DRY)
def test_dry_run_prints_the_commands_and_runs_nothing(request, words):
    cloud = request.getfixturevalue("cloud" if words[0] == "create" else "installed")
    cloud.forget_calls()
    printed = cloud.pod(words[0], "--dry-run", *words[1:])
    assert cloud.calls() == []
    shutil.copytree(cloud.folder, cloud.folder.parent / "before", symlinks=True)
    pasted = subprocess.run(["bash", "-e", "-c", printed], env=cloud.environment, capture_output=True, text=True)
    assert pasted.returncode == 0, pasted.stderr
    by_hand = cloud.calls()
    assert by_hand
    cloud.kill_runs()
    shutil.rmtree(cloud.folder)
    shutil.move(cloud.folder.parent / "before", cloud.folder)
    cloud.pod(*words)
    assert cloud.calls() == by_hand


def test_dry_run_of_watch_shows_each_step(cloud):
    printed = cloud.pod("watch", "--dry-run", "--slices=2", *TRAIN)
    assert cloud.calls() == []
    steps = [shlex.split(line)[3:5] for line in printed.splitlines() if line.startswith("gcloud")]
    assert ["queued-resources", "delete"] in steps
    assert ["queued-resources", "create"] in steps
    assert steps[-1] == ["tpu-vm", "ssh"]
    subprocess.run(["bash", "-n", "-c", printed], check=True)
