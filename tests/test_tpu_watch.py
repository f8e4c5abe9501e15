"""tpu/pod watch: preemptions, errors and broken connections during a run."""

import json
import threading

import stand_in_cloud
from stand_in_cloud import TRAIN, write_whole

templates, cloud, installed = stand_in_cloud.templates, stand_in_cloud.cloud, stand_in_cloud.installed


def finish(cloud, process, status=0):
    output = process.communicate(timeout=30)[0]
    assert process.returncode == status, output
    return output


def test_watch_recreates_a_preempted_slice_and_ends_with_the_run(cloud):
    process = cloud.start("watch", "--poll=0", "--spot", *TRAIN)
    cloud.wait_for("*/*/options.json", 2)
    cloud.preempt()
    cloud.wait_for("*/*/options.json", 0)  # deleted with the old disks
    cloud.wait_for("*/*/options.json", 2)
    assert cloud.options() == 2 * [TRAIN[1:]]
    cloud.write("finish", "0")
    output = finish(cloud, process)
    assert "my-run is PREEMPTED: recreating it" in output
    assert output.rstrip().endswith("tpu/pod: the run has ended")
    assert len(cloud.calls("tpu-vm create")) == 2
    assert all("--spot" in call for call in cloud.calls("tpu-vm create"))
    assert "--quiet" in cloud.calls("tpu-vm delete")[0]


def test_watch_waits_for_capacity_and_recreates_all_slices(cloud):
    process = cloud.start("watch", "--poll=0", "--slices=2", *TRAIN)
    cloud.wait_for("*/*/options.json", 4)
    cloud.preempt("my-run-1", queued=True)
    cloud.wait_for("*/*/options.json", 0)
    cloud.wait_for("*/*/options.json", 4)
    cloud.write("finish", "0")
    output = finish(cloud, process)
    assert "my-run is WAITING_FOR_RESOURCES" in output or "my-run is PROVISIONING: waiting" in output
    assert "my-run is SUSPENDED: recreating it" in output
    assert len(cloud.calls("queued-resources create")) == 2


def test_watch_launches_again_after_an_error_and_finally_gives_up(cloud):
    process = cloud.start("watch", "--poll=0", "--retries=1", "--grace=1", *TRAIN)
    homes = [file.parent for file in cloud.wait_for("*/*/options.json", 2)]
    for _ in range(2):
        cloud.wait_for("*/*/options.json", 2)
        for home in homes:
            (home / "options.json").unlink()
        write_whole(homes[0] / "finish", "3")  # one worker fails, the other waits for it
        cloud.wait_for("*/worker-0/layerskip_jax_run/exit", 1)
        (homes[0] / "finish").unlink(missing_ok=True)
    output = finish(cloud, process, status=1)
    assert "state: ended 3" in output
    assert "(1 of 1 failures allowed)" in output
    assert output.rstrip().endswith("watch gives up after 2 failures, and my-run may still cost money")


def test_watch_launches_again_after_an_error_whose_text_names_a_state(cloud):
    process = cloud.start("watch", "--poll=0", "--retries=1", "--grace=1", *TRAIN)
    cloud.wait_for("*/*/options.json", 2)
    for home in cloud.homes():
        (home / "options.json").unlink()
        with (home / "layerskip_jax_run/log").open("a") as log:
            log.write("error: another process stopped responding: its folder is absent\n")
        write_whole(home / "finish", "75")
    cloud.wait_for("*/*/layerskip_jax_run/exit", 2)
    for home in cloud.homes():
        (home / "finish").unlink()
    cloud.wait_for("*/*/options.json", 2)
    cloud.write("finish", "0")
    output = finish(cloud, process)
    assert "state: ended 75 (error: another process stopped responding: its folder is absent)" in output
    assert "(1 of 1 failures allowed)" in output


def test_watch_survives_a_quota_error_a_broken_connection_and_a_failed_check(cloud):
    message = "Quota limit 'TPUS_PER_PROJECT' has been exceeded. Limit: 0 in region us-east5."
    faults = [
        {"command": "tpu-vm create", "message": message},
        {"command": "tpu-vm list", "message": "UNAVAILABLE"},
        {"command": "ssh", "message": "Connection refused", "status": 255, "worker": 1, "times": 2},
    ]
    write_whole(cloud.folder / "faults.json", json.dumps(faults))
    process = cloud.start("watch", "--poll=0", *TRAIN)
    cloud.wait_for("*/*/options.json", 2)
    cloud.write("finish", "0")
    output = finish(cloud, process)
    assert message in output
    assert "could not read the state of my-run" in output
    assert "create failed (1 of 5 failures allowed)" in output
    assert "not every worker of my-run answers" in output


def test_a_quota_error_ends_create_and_a_watch_without_retries(cloud):
    cloud.fault("tpu-vm create", "Quota limit exceeded", times=2)
    assert cloud.refused("create", status=1).startswith("could not create my-run: see gcloud's message above")
    output = cloud.pod("watch", "--poll=0", "--retries=0", *TRAIN, status=1)
    assert "Quota limit exceeded" in output
    assert "create failed; watch gives up after 1 failures" in output


def test_watch_ends_after_a_manual_stop(cloud):
    process = cloud.start("watch", "--poll=0", *TRAIN)
    cloud.wait_for("*/*/options.json", 2)
    cloud.pod("stop")
    output = finish(cloud, process, status=1)
    assert output.rstrip().endswith("error: the run was stopped by tpu/pod stop, so watch ends too")


def test_watch_gives_up_on_workers_that_have_never_answered(cloud):
    cloud.fault("ssh", "Permission denied (publickey)", status=255, times=9)
    output = cloud.pod("watch", "--poll=0", "--retries=1", *TRAIN, status=1)
    assert "Permission denied (publickey)" in output
    assert output.rstrip().endswith("gives up after 2 failures, and my-run may still cost money")


def test_a_run_whose_exit_status_is_written_late_is_not_lost(installed):
    """Its process has ended, and the shell that waited for it is about to write the status."""
    installed.write("layerskip_jax_run/pid", "999999\n")
    late = threading.Timer(0.8, installed.write, ["layerskip_jax_run/exit", "0\n"])
    late.start()
    assert installed.pod("status") == "my-run: READY\n" + 2 * "state: ended 0\n"
    late.join()


def test_status_shows_the_error_of_a_run_that_has_failed(installed):
    installed.write("layerskip_jax_run/exit", "2\n")
    installed.write("layerskip_jax_run/log", "error: an older one\nstep 1\nerror: no such file\n--- the end\n")
    assert installed.pod("status") == "my-run: READY\n" + 2 * "state: ended 2 (error: no such file)\n"
    killed = "error: of another run\n--- Sat Nov 28: python train.py --config x.py\nstep 1\n"
    installed.write("layerskip_jax_run/log", killed)
    assert installed.pod("status") == "my-run: READY\n" + 2 * "state: ended 2\n"
