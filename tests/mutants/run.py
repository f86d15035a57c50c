#!/usr/bin/env python3
"""Mutation testing of the security core: all mutants in one build, each behind a switch ("mutant schemata").

`cargo mutants` lists the mutants, but it builds the crate once for each. This script writes all of them into a copy of the
repository, each behind `crate::mutest::on(N)`, and builds the copy once. The environment variable `MUTEST` names the mutant that
is on. A recording run of every test tells which mutants that test reaches, so that a mutant meets only the tests that can see it.

    pip install tree-sitter tree-sitter-rust; cargo install cargo-mutants
    tests/mutants/run.py build     # copy, switch, build; mutants that do not compile are left out ("unviable")
    tests/mutants/run.py record    # every test once, in a process of its own: its time, and the mutants it reaches
    tests/mutants/run.py run       # every mutant against the tests that reach it; goes on where it ended; --budget is per mutant
    tests/mutants/run.py table     # the table of docs/TESTING.md, and every mutant that survived

A mutant is caught if a test fails or runs out of time (three times its usual time and 5 s). `explained.tsv` names the mutants that
no test can catch, and why. All state is in `--state`; nothing is written to the repository.
"""
import argparse, collections, concurrent.futures, csv, json, os, pathlib, re, resource, shutil, signal, subprocess, sys, tempfile, threading, time

from schemata import SWITCH, Writer

ROOT = pathlib.Path(__file__).resolve().parents[2]
MODULES = ["pdp", "token", "revocation", "service", "sync", "pap", "snapshot", "model/constraint", "policy/compile/evaluate"]
CHUNK_S = (0.1, 0.5, 2, 5)  # tests share a process while they are expected to take no longer than this: few at first, then more


def listed():
    """All mutants that `cargo mutants` lists, numbered from 1, each with a key that survives a change of lines."""
    command = ["cargo", "mutants", "--list", "--json", "--no-config", "-e", "tests.rs", "-e", "**/tests/**"]
    for module in MODULES:
        command += ["-f", f"src/{module}.rs", "-f", f"src/{module}/**"]
    mutants, seen = json.loads(subprocess.check_output(command, cwd=ROOT)), collections.Counter()
    for number, mutant in enumerate(mutants, 1):
        mutant.pop("diff", None)
        name, function = mutant["name"].split(": ", 1)[1], (mutant.get("function") or {}).get("function_name", "-")
        name = name.removesuffix(f" in {function}")
        seen[mutant["file"], function, name] += 1
        nth = seen[mutant["file"], function, name]
        mutant.update(id=number, key=[mutant["file"], function, name + (f" ({nth})" if nth > 1 else "")])
    return mutants


def load(name, default=None):
    path = STATE / name
    return json.loads(path.read_text()) if path.exists() else default


def save(name, value):
    (STATE / (name + ".new")).write_text(json.dumps(value))
    os.replace(STATE / (name + ".new"), STATE / name)


def build():
    """Copies the repository, puts in every mutant, and leaves out those that the compiler refuses until it refuses none."""
    from tree_sitter import Language, Parser
    import tree_sitter_rust

    parser, mutants = Parser(Language(tree_sitter_rust.language())), listed()
    is_known = [mutant["key"] for mutant in mutants] == [mutant["key"] for mutant in load("mutants.json", [])]
    unviable = load("unviable.json", {}) if is_known else {}
    files = subprocess.check_output(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT)
    for file in filter(None, files.decode().split("\0")):
        write(TREE / file, (ROOT / file).read_bytes(), (ROOT / file).stat().st_mode)
    write(TREE / "src/mutest.rs", SWITCH.replace("COUNT", str(len(mutants) + 1)).encode())
    allowed = b"#![allow(warnings, arithmetic_overflow, unconditional_panic, clippy::all)]\n#[doc(hidden)]\npub mod mutest;\n"
    text = (ROOT / "src/lib.rs").read_bytes()
    write(TREE / "src/lib.rs", text.replace(b"\npub mod api;", b"\n" + allowed + b"pub mod api;", 1))
    while True:
        ranges = {}
        for file in sorted({mutant["file"] for mutant in mutants}):
            chosen = [m for m in mutants if m["file"] == file and str(m["id"]) not in unviable]
            writer = Writer((ROOT / file).read_bytes(), chosen, parser)
            writer.visit(writer.root)
            unviable.update({str(number): why for number, why in writer.misplaced.items()})
            write(TREE / file, b"".join(writer.out))
            ranges[file] = writer.ranges
        messages, ends_well = compile_tests(["--lib"])  # first alone: it shows every error, and soon
        if ends_well:
            messages, ends_well = compile_tests(["--lib", "--bins", "--test", "memory", "--test", "it"])
        if ends_well:
            break
        before = len(unviable)
        for message in messages:
            if message["reason"] == "compiler-message" and message["message"]["level"] == "error" and message["message"]["spans"]:
                numbers = blamed(message["message"], ranges)
                unviable.update({str(number): message["message"]["message"] for number in numbers})
                if not numbers:
                    print(message["message"]["rendered"])
        save("mutants.json", mutants)
        save("unviable.json", unviable)
        print(f"{len(unviable)} unviable of {len(mutants)}", flush=True)
        if len(unviable) == before:
            sys.exit("the copy does not build, and no mutant is to blame")
    programs = [m for m in messages if m["reason"] == "compiler-artifact" and m["executable"] and m["profile"]["test"]]
    save("mutants.json", mutants)
    save("unviable.json", unviable)
    save("programs.json", {m["target"]["name"]: m["executable"] for m in programs if m["target"]["kind"] != ["bin"]})


def compile_tests(targets):
    """What cargo says of the copy, and whether it builds."""
    command = OPTIONS.cargo.split() + ["test", "--locked", "--no-run", "--message-format=json", *targets]
    environment = os.environ | {"CARGO_TARGET_DIR": str(OPTIONS.target)}
    ran = subprocess.run(command, cwd=TREE, env=environment, stdout=subprocess.PIPE)
    return [json.loads(line) for line in ran.stdout.splitlines() if line.startswith(b"{")], ran.returncode == 0


def write(path, content, mode=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)
        if mode:
            path.chmod(mode)


def blamed(message, ranges):
    """The mutants whose text an error of the compiler points to: the narrowest around a span, the main spans first."""
    spans = message["spans"] + [span for child in message["children"] for span in child["spans"]]
    for span in sorted(spans, key=lambda span: not span["is_primary"]):
        around = [
            (end - start, number) for start, end, number in ranges.get(span["file_name"], ())
            if start <= span["byte_start"] and span["byte_end"] <= end
        ]
        if around:
            return [number for size, number in around if size == min(around)[0]]
    return []


def execute(program, tests, timeout_s, **environment):
    """Runs tests of one program in a process of its own.

    Returns the exit status, `None` where it ran out of time; the seconds that it took; and the tests that did not pass.
    """
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    folder = tempfile.mkdtemp(dir=STATE / "tmp")
    environment = os.environ | {"TMPDIR": folder, "RUST_BACKTRACE": "0"} | environment
    command, start = [program, "--exact", "--test-threads=1", *tests], time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(
            command, cwd=TREE, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=limit,
        )
        try:
            status = child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            status = None
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        child.wait()
        output.seek(0)
        begun = re.findall(r"^test (\S+)(?: - should panic)? \.\.\.( ok$)?", output.read(), re.MULTILINE)
    shutil.rmtree(folder, ignore_errors=True)
    return status, time.monotonic() - start, [name for name, ok in begun if not ok]


def record():
    """Runs every test once, no mutant on, and notes its time and the mutants that it reaches. A test is run again if it is named."""
    tests, todo = load("tests.json", {}), []
    for kind, program in load("programs.json").items():
        names = subprocess.check_output([program, "--list"], cwd=TREE).decode().splitlines()
        names = [f"{kind} {name.removesuffix(': test')}" for name in names if name.endswith(": test")]
        tests = {name: test for name, test in tests.items() if name in names or not name.startswith(f"{kind} ")}
        wanted = [name for name in names if any(word in name for word in OPTIONS.only.split(","))] if OPTIONS.only else names
        todo += [(program, name) for name in sorted(wanted) if OPTIONS.only or name not in tests]

    def reach(program, name):
        note = pathlib.Path(tempfile.mktemp(dir=STATE / "tmp"))
        status, seconds, _ = execute(program, [name.split()[1]], 600, MUTEST_RECORD=str(note))
        reached = sorted({int(line) for line in note.read_text().split()}) if note.exists() else []
        note.unlink(missing_ok=True)
        return name, {"seconds": seconds, "passes": status == 0, "reached": reached}

    with concurrent.futures.ThreadPoolExecutor(OPTIONS.jobs) as pool:
        for name, test in pool.map(lambda chosen: reach(*chosen), todo):
            tests[name] = test
            save("tests.json", tests)
            if not test["passes"]:
                print(f"left out, for it fails with no mutant on: {name}", flush=True)


def run():
    """Tries every mutant against the tests that reach it.

    First come those that caught its neighbours, then those that are fast and reach little else.
    """
    programs, tests, results, unviable = load("programs.json"), load("tests.json"), load("results.json", {}), load("unviable.json")
    reaching, killers = collections.defaultdict(list), collections.defaultdict(collections.Counter)
    for name, test in tests.items():
        for number in test["reached"] if test["passes"] else ():
            reaching[number].append(name)
    chosen = tuple((OPTIONS.only or "src/").split(","))
    mutants = [m for m in load("mutants.json") if str(m["id"]) not in unviable and m["file"].startswith(chosen)]
    for mutant in mutants:
        result = results.setdefault(str(mutant["id"]), {"caught": None, "tried": []})
        if result["caught"]:
            killers[mutant["file"]][result["caught"]] += 1
            killers[tuple(mutant["key"][:2])][result["caught"]] += 1

    lock = threading.Lock()  # held to read what other threads change, and to change it

    def attack(mutant):
        result, file, spent, attempts = results[str(mutant["id"])], mutant["file"], 0.0, 0
        left = [name for name in reaching[mutant["id"]] if name not in result["tried"] and tests[name]["seconds"] <= OPTIONS.slowest]
        with lock:
            near = killers[file] + killers[tuple(mutant["key"][:2])]
        cost = lambda name: tests[name]["seconds"] * (20 + len(tests[name]["reached"])) / (1 + 10 * near[name])
        left.sort(key=cost)
        while left and not result["caught"] and spent < OPTIONS.budget:
            chunk, expected, chunk_s = [], 0.0, CHUNK_S[min(attempts, len(CHUNK_S) - 1)]
            kind, attempts = left[0].split()[0], attempts + 1
            while left and left[0].split()[0] == kind and (not chunk or expected + tests[left[0]]["seconds"] < chunk_s):
                expected += tests[left[0]]["seconds"]
                chunk.append(left.pop(0))
            again = lambda: execute(
                programs[kind], [name.split()[1] for name in chunk], 3 * expected + 5, MUTEST=str(mutant["id"])
            )
            status, seconds, failed = again()
            spent += seconds
            if status not in (0, None) and expected > 1:  # a slow test may fail for other reasons: it must fail twice
                status, _, failed = again()
            result["tried"] += chunk
            if status != 0:
                with lock:
                    result.update(caught=f"{kind} {(failed or ['?'])[0]}", how="time" if status is None else f"exit {status}")
                    killers[file][result["caught"]] += 1
                    killers[tuple(mutant["key"][:2])][result["caught"]] += 1

    new = [mutant for mutant in mutants if not (OPTIONS.new and results[str(mutant["id"])]["tried"])]
    with concurrent.futures.ThreadPoolExecutor(OPTIONS.jobs) as pool:
        for count, _ in enumerate(pool.map(attack, new), 1):
            if count % 20 == 0 or count == len(new):
                with lock:
                    save("results.json", results)
                print(f"{count} of {len(new)}: {sum(bool(r['caught']) for r in results.values())} caught", flush=True)
    save("results.json", results)


def table():
    """Prints the table by module, then what survived and is not explained, then what is explained and was caught all the same."""
    mutants, results, unviable = load("mutants.json"), load("results.json", {}), load("unviable.json")
    rows = csv.reader((ROOT / "tests/mutants/explained.tsv").open(), delimiter="\t", quoting=csv.QUOTE_NONE)
    explained = {tuple(row[:3]): row[3] for row in rows if row and not row[0].startswith("#")}
    counts, notes = {name: collections.Counter() for name in [*MODULES, "all"]}, []
    reaching = collections.Counter(n for test in load("tests.json", {}).values() if test["passes"] for n in test["reached"])
    for mutant in mutants:
        number, key = str(mutant["id"]), tuple(mutant["key"])
        module = next(m for m in MODULES if mutant["file"].startswith((f"src/{m}.rs", f"src/{m}/")))
        result = results.get(number, {"caught": None, "tried": []})
        untried = len(result["tried"]) < max(1, reaching[mutant["id"]])
        if number in unviable:
            kind = "unviable"
        elif result["caught"]:
            kind = "caught"
        else:
            kind = "explained" if key in explained else "open" if untried else "missed"
        for name in (module, "all"):
            counts[name][kind] += 1
        if kind in ("missed", "open"):
            notes.append(f"{kind} {number}: {mutant['name']}, after {len(result['tried'])} of {reaching[mutant['id']]} tests")
        if result["caught"] and key in explained:
            notes.append(f"explained, and caught by {result['caught']}: {mutant['name']}")
    unknown = set(explained) - {tuple(mutant["key"]) for mutant in mutants}
    columns = ["caught", "explained", "missed", "open", "unviable"]
    print("| module | mutants | " + " | ".join(columns) + " | caught of all |\n|---|" + "--:|" * (len(columns) + 2))
    for module, count in counts.items():
        viable = count.total() - count["unviable"]
        cells = [module, viable, *(count[name] for name in columns), f"{100 * count['caught'] / max(1, viable):.1f} %"]
        print("| " + " | ".join(map(str, cells)) + " |")
    print("\n".join([""] + notes + [f"explained, and no mutant: {key}" for key in sorted(unknown)]))


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("step", choices=["build", "record", "run", "table"])
    arguments.add_argument("--state", type=pathlib.Path, default=ROOT / "target/mutants", help="the copy, and what is known so far")
    arguments.add_argument("--target", type=pathlib.Path, help="where cargo builds; a folder of the state by default")
    arguments.add_argument("--cargo", default="cargo", help="the command that runs cargo")
    arguments.add_argument("--budget", type=float, default=60, help="run: seconds of tests for a mutant in this run")
    arguments.add_argument("--slowest", type=float, default=1e9, help="run: leave out tests that take longer, in seconds")
    arguments.add_argument("--jobs", type=int, default=1, help="record and run: processes at a time")
    arguments.add_argument("--new", action="store_true", help="run: only mutants that met no test yet")
    arguments.add_argument("--only", help="record: tests with one of these words; run: files that begin with one of these paths")
    OPTIONS = arguments.parse_args()
    STATE = OPTIONS.state.resolve()
    TREE = STATE / "tree"
    OPTIONS.target = (OPTIONS.target or STATE / "build").resolve()
    (STATE / "tmp").mkdir(parents=True, exist_ok=True)
    {"build": build, "record": record, "run": run, "table": table}[OPTIONS.step]()
