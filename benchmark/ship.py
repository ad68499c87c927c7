"""A run without what only training needs: small enough to hand on, to be watched and evaluated.

    python benchmark/ship.py runs/RUN benchmark/results/hunting_target
    python mg2l_mappo.py --meta-test benchmark/results/hunting_target --capture-video

Keeps args.json, meta_test.csv and a checkpoint of the networks; stored contexts and the optimisers' state go. It can be
loaded and meta-tested, and --resume refuses it.
"""

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the scripts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("out", type=Path, help="folder to write")
    given = parser.parse_args()
    try:
        args = json.loads((given.run / "args.json").read_text())
        script = importlib.import_module(args["script"])
        content = script.load_checkpoint(given.run)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    of_this_machine = dict(run_dir="runs", run_name=given.out.name)
    content["args"] |= of_this_machine
    content["optimizers"] = {}
    if "context" in content:
        content["context"] = content["context"][:, :0].clone()
    given.out.mkdir(parents=True, exist_ok=True)
    script.save_checkpoint(given.out / "checkpoint.pt", content)
    (given.out / "checkpoint_previous.pt").unlink(missing_ok=True)
    (given.out / "args.json").write_text(json.dumps(args | of_this_machine, indent=2) + "\n")
    shutil.copyfile(given.run / "meta_test.csv", given.out / "meta_test.csv")
    print(f"{given.out}: {(given.out / 'checkpoint.pt').stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
