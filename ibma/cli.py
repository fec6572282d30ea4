"""The command `ibma`: run the reproduction notebooks, look at their results.

Exit codes: 0 all is well; 1 a run or a notebook failed; 2 the command was wrong (one line says how).
"""
from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path

from ibma import runs

STORES = ("results", ".runs/smoke")     # where results lie unless --store says otherwise


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")   # one line, without the usage block


def _assignment(text):
    """NAME=VALUE; the value as JSON where it is JSON (0.5, true, [0, 1]), else as text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"NAME=VALUE is expected, not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def _positive(text):
    if not text.lstrip("-").isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"a number of processes is expected (-1: one per core), not {text!r}")
    return int(text)


def _parser():
    parser = _Parser(prog="ibma", description="Information-bottleneck multimodal alignment: reproduce and inspect results.")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", title="commands", parser_class=_Parser)

    command = commands.add_parser("reproduce", help="execute the notebooks behind the tables and figures",
                                  description="Execute the notebooks of nbs/6_reproduction with the parameters of a profile. "
                                              "Finished runs and unchanged notebooks are kept, so it can be stopped and resumed.")
    command.add_argument("--profile", default="smoke", help="smoke (minutes), cpu (hours), paper (a GPU), or another of profiles.yml")
    command.add_argument("--table", action="append", metavar="NAME", dest="tables", help="only this notebook; may be repeated")
    command.add_argument("--set", action="append", metavar="NAME=VALUE", type=_assignment, default=[], dest="settings",
                         help="a parameter for the notebooks that declare it; may be repeated")
    command.add_argument("--jobs", type=_positive, default=1, metavar="N", help="processes per grid of runs (-1: one per core)")
    command.add_argument("--store", metavar="DIR", help="where runs are recorded, relative to the root")
    command.add_argument("--root", default=".", metavar="DIR", help="root of the repository (default: here)")
    command.add_argument("--dry-run", action="store_true", help="print what would run, and with which parameters")

    command = commands.add_parser("results", help="list the recorded tables", description="Count finished and failed runs per table.")
    command.add_argument("--store", action="append", metavar="DIR", dest="stores", help=f"default: {' and '.join(STORES)}")
    return parser


def _table(rows):
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    numbers = [all(row[i].isdigit() for row in rows[1:]) for i in range(len(rows[0]))]
    for row in rows:
        cells = (cell.rjust(width) if number else cell.ljust(width) for cell, width, number in zip(row, widths, numbers, strict=True))
        print("  ".join(cells).rstrip())


def _reproduce(args):
    repeated = [name for name, count in Counter(name for name, _ in args.settings).items() if count > 1]
    if repeated:
        raise ValueError(f"--set {repeated[0]} is given twice")
    chosen = {"profile": args.profile, "tables": args.tables, "root": args.root, "store": args.store, "jobs": args.jobs,
              "parameters": dict(args.settings)}
    if args.dry_run:
        pages = runs.plan(**chosen)
        _table([["notebook", "would be", "parameters"], *(
            [page.name, "kept" if page.kept else "run", " ".join(f"{name}={json.dumps(value)}" for name, value in page.parameters.items())]
            for page in pages)])
        return 0
    try:
        runs.reproduce(**chosen)
    except runs.ReproductionError as exc:
        print(f"ibma: {exc}", file=sys.stderr)
        return 1
    return 0


def _results(args):
    for folder in args.stores or ():
        if not Path(folder).is_dir():
            raise ValueError(f"no folder {folder!r}")
    rows = [["store", "table", "finished", "failed", "unreadable", "data"]]
    for folder in args.stores or STORES:
        store = runs.RunStore(folder)
        for table in store.tables():
            unreadable = store.unreadable(table)
            for name in unreadable:
                print(f"ibma: {folder}/{table}/{name} is unreadable and counts as not done", file=sys.stderr)
            records = store.records(table, warn=False)
            states = Counter(record["status"] for record in records)
            kinds = sorted({record["data_kind"] or "not said" for record in records})
            rows.append([folder, table, str(states["finished"]), str(states["failed"]), str(len(unreadable)), ", ".join(kinds)])
    if len(rows) == 1:
        print("no results yet: ibma reproduce makes them")
    else:
        _table(rows)
    return 0


def main(argv=None):
    """Run the command line and return the exit code."""
    parser = _parser()
    try:
        args = parser.parse_args(argv)
        if args.version:
            from ibma import __version__
            print(f"ibma {__version__}")
            return 0
        if args.command is None:
            parser.error("a command is needed: reproduce or results")
        return {"reproduce": _reproduce, "results": _results}[args.command](args)
    except SystemExit as exc:            # argparse has printed its line
        return int(exc.code or 0)
    except (ValueError, TypeError, FileNotFoundError, ImportError) as exc:
        print(f"ibma: error: {' '.join(str(exc).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("ibma: interrupted; finished runs are kept", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
