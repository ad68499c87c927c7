"""Many runs on one machine or many, by Ray: scripts x environments x seeds, each run a process of its own.

    python benchmark/sweep.py --scripts mg2l_mappo task_given --env-ids hunting_target --seeds 1 2 3 4 5
    python benchmark/sweep.py --seeds 1 2 3 --run-dir runs/short -- --total-timesteps 100000
    python benchmark/sweep.py --gpus 0.2 --cores 3 --seeds 1 2 3 4 5 --run-dir runs/gpu        # five on one GPU
    python benchmark/sweep.py --address auto --run-dir /shared/runs         # on a cluster that runs already

What follows `--` goes to every script. Run folders are RUN_DIR/{env_id}__{script}__{seed}, with what a run printed in a
.log beside. The same command goes on where it was stopped: a run that is finished is skipped, one that is not is
resumed from its checkpoint. So is one whose worker dies; it gets three more tries. A run that loses its worker is ended
by SIGTERM and saves itself. Failures are told at the end with their last lines; the exit status is then 1.

On a cluster all machines must see this repository and RUN_DIR at the same place, and `ray start` needs
RAY_kill_child_processes_on_worker_exit=false. Where machines cannot lock a file for each other, as on some NFS, do not
start the command again before the runs it had have ended.
"""

import argparse
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import envs

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("mg2l_mappo", "task_given", "ma_pearl", "mix_mate")
ONE_GPU = "mg2l_mappo_cudagraphs"  # only if asked for


def train(script: str, env_id: str, seed: int, run: Path, flags: list[str]) -> int:
    """One run to its end, from its checkpoint if it has one; returns the exit status. Called in a worker of Ray."""
    command = [sys.executable, str(ROOT / f"{script}.py")]
    with open(run.with_suffix(".log"), "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # the run holds it too: one that lost its worker is waited for
        if (run / "finished").exists():
            return 0
        if (run / "checkpoint.pt").is_file():
            command += ["--resume", str(run)]
        else:
            shutil.rmtree(run, ignore_errors=True)  # it was stopped before it had anything to go on from
            command += ["--env-id", env_id, "--seed", str(seed), *flags]
            command += ["--run-dir", str(run.parent), "--run-name", run.name]
        log.write(f"\n+ {' '.join(command)}\n")
        log.flush()
        given = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
        process = subprocess.Popen(command, **given, start_new_session=True)  # out of reach of Ray, which would kill it
        guard = ["sh", "-c", f"read line; kill {process.pid}"]  # SIGTERM, once, when its input ends as this worker does
        guard = subprocess.Popen(guard, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        code = process.wait()
        guard.kill()
        guard.communicate()
        if code == 0:
            (run / "finished").touch()
        return code


def last_lines(run: Path, count: int) -> list[str]:
    """What a run printed last; of a progress bar the last state."""
    log = run.with_suffix(".log")
    if not log.exists():
        return []
    lines = log.read_bytes()[-4000:].decode(errors="replace").splitlines()  # a carriage return ends a line too
    return [line for line in lines if line.strip()][-count:]


def main() -> None:
    ours, flags = sys.argv[1:], []
    if "--" in ours:
        flags = ours[ours.index("--") + 1 :]
        ours = ours[: ours.index("--")]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scripts", nargs="+", default=SCRIPTS, choices=(*SCRIPTS, ONE_GPU))
    parser.add_argument("--env-ids", nargs="+", default=["hunting_target"], choices=envs.ENV_IDS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4, 5])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/sweep"), help="folder of the run folders")
    parser.add_argument("--cores", type=int, default=1, help="CPU cores, and threads, of each run")
    parser.add_argument("--gpus", type=float, default=0, help="GPUs of each run; 0.2 puts five runs on one")
    parser.add_argument("--address", help="of a Ray cluster to join; without it one is started on this machine")
    parser.add_argument("--every", type=float, default=10, help="seconds between two views of the progress")
    args = parser.parse_args(ours)
    if args.cores < 1 or args.gpus < 0:
        parser.error(f"cores, gpus: got {args.cores} and {args.gpus}, expected at least 1 and 0")
    flags += ["--num-threads", str(args.cores), "--cuda" if args.gpus else "--no-cuda"]

    run_dir = args.run_dir.resolve()
    saved = run_dir / "flags.txt"
    if saved.exists() and list(run_dir.glob("*/checkpoint.pt")) and (before := shlex.split(saved.read_text())) != flags:
        parser.error(f"run-dir: got flags {shlex.join(flags)}, expected {shlex.join(before)}, those of its runs")

    if not args.address:  # of the Ray that is started here, which only this machine reaches
        os.environ["RAY_AUTH_MODE"] = "disabled"
        os.environ["RAY_kill_child_processes_on_worker_exit"] = "false"  # they get SIGTERM, and save themselves
    import ray

    try:
        ray.init(args.address or "local", include_dashboard=False, log_to_driver=False, logging_level="error")
    except ConnectionError as error:
        parser.error(f"address: got {args.address} ({str(error).splitlines()[0]}), expected that of a Ray that runs")
    largest = {kind: max(node["Resources"].get(kind, 0) for node in ray.nodes()) for kind in ("CPU", "GPU")}
    if largest["CPU"] < args.cores or largest["GPU"] < args.gpus:
        has = f"{largest['CPU']:.0f} and {largest['GPU']:.0f}, as the largest machine has"
        parser.error(f"cores, gpus: got {args.cores} and {args.gpus}, expected at most {has}")
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        saved.write_text(shlex.join(flags))
    except OSError as error:
        parser.error(f"run-dir: got {run_dir} ({error.strerror}), expected a folder that can be written to")
    remote = ray.remote(num_cpus=args.cores, num_gpus=args.gpus, max_retries=3, max_calls=1)(train)
    waiting, failed = {}, {}  # Ray's handle -> run; run -> what went wrong
    for seed in args.seeds:  # seed by seed, so that all methods have some early on
        for env_id in args.env_ids:
            for script in args.scripts:
                run = run_dir / f"{env_id}__{script}__{seed}"
                waiting[remote.remote(script, env_id, seed, run, flags)] = run

    total, begun, shown, view = len(waiting), time.time(), 0.0, []
    width = shutil.get_terminal_size((120, 0)).columns - 1
    while waiting:
        done, _ = ray.wait(list(waiting), timeout=min(1.0, args.every))
        for handle in done:
            run = waiting.pop(handle)
            try:
                if code := ray.get(handle):
                    failed[run] = f"exit status {code}"
            except ray.exceptions.RayError as error:
                failed[run] = f"{type(error).__name__} of Ray"
        if time.time() - shown > args.every or not waiting:
            shown = time.time()
            log = lambda run: run.with_suffix(".log")  # noqa: E731
            running = [run for run in waiting.values() if log(run).exists() and log(run).stat().st_mtime > begun]
            counts = f"{total - len(waiting) - len(failed)} finished, {len(failed)} failed, {len(running)} running"
            last, view = view, [f"{total} runs: {counts}, {len(waiting) - len(running)} waiting"]
            view += [f"  {run.name}: {''.join(last_lines(run, 1))}"[:width] for run in running]
            if last and sys.stdout.isatty():
                print(f"\x1b[{len(last)}A\x1b[J", end="")  # over the last view
            if view != last or sys.stdout.isatty():
                print("\n".join(view), flush=True)

    for run, what in failed.items():
        print(f"\n{run.name} failed ({what}):\n  " + "\n  ".join(last_lines(run, 5)), file=sys.stderr)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nstopped; runs save themselves, and the same command goes on", file=sys.stderr)
        sys.exit(130)
