"""Writes mutants into a source file, each behind a switch ("mutant schemata"), so that one build holds all of them."""
import collections

# The module `mutest` of the copy; `COUNT` is replaced.
SWITCH = """//! The mutant that is switched on by the environment.
use std::io::Write as _;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
const UNREAD: u32 = u32::MAX;
const RECORDING: u32 = u32::MAX - 1;
static ACTIVE: AtomicU32 = AtomicU32::new(UNREAD);
static REACHED: [AtomicBool; COUNT] = [const { AtomicBool::new(false) }; COUNT];
/// Whether this mutant is on.
pub fn on(mutant: u32) -> bool {
    let mut active = ACTIVE.load(Relaxed);
    if active == UNREAD {
        let named = std::env::var("MUTEST").ok().and_then(|number| number.parse().ok()).unwrap_or(0);
        active = if std::env::var_os("MUTEST_RECORD").is_some() { RECORDING } else { named };
        ACTIVE.store(active, Relaxed);
    }
    if active == RECORDING && !REACHED[mutant as usize].swap(true, Relaxed) {
        let file = std::env::var_os("MUTEST_RECORD").unwrap();
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(file).unwrap();
        file.write_all(format!("{mutant}\\n").as_bytes()).unwrap();
    }
    active == mutant
}
"""


class Writer:
    """Writes one source file with its mutants behind switches, and notes which bytes of the result belong to which mutants."""

    def __init__(self, source, mutants, parser):
        self.source, self.root = source, parser.parse(source).root_node
        self.lines = [0]
        for line in source.split(b"\n"):
            self.lines.append(self.lines[-1] + len(line) + 1)
        self.out, self.length, self.ranges, self.misplaced = [], 0, [], {}
        self.sites = collections.defaultdict(list)
        for mutant in mutants:
            node, why = self.site(mutant)
            if why:
                self.misplaced[mutant["id"]] = why
            else:
                self.sites[node.start_byte, node.end_byte, node.type].append(mutant)
        self.marks = sorted(start for start, _, _ in self.sites)

    def offset(self, point):
        start = self.lines[point["line"] - 1]
        line = self.source[start : self.lines[point["line"]]].decode()
        return start + len(line[: point["column"] - 1].encode())

    def site(self, mutant):
        """The syntax node that the mutant changes, or why it cannot have a switch."""
        start, end, genre = self.offset(mutant["span"]["start"]), self.offset(mutant["span"]["end"]), mutant["genre"]
        end = start + 1 if genre == "StructField" else end  # its span may take in a comma
        node = self.root.descendant_for_byte_range(start, end)
        kinds = {
            "FnValue": ["function_item"], "BinaryOperator": ["binary_expression", "compound_assignment_expr"],
            "UnaryOperator": ["unary_expression"], "MatchArm": ["match_arm"], "MatchArmGuard": ["match_pattern"],
            "StructField": ["field_initializer", "shorthand_field_initializer"],
        }[genre]
        if genre == "FnValue" and "impl " in mutant["function"]["return_type"]:
            return None, "a function that returns `impl Trait` returns one type"
        if genre in ("BinaryOperator", "UnaryOperator"):
            node = node.parent  # of the operator's token
            if node.type == "let_chain":
                return None, "`||` beside `let` does not compile"
        while node and node.type not in kinds and node.type != "token_tree":
            node = node.parent
        if not node or node.type == "token_tree":
            return None, "inside of a macro"
        above = node
        while above := above.parent:
            if above.type in ("const_item", "static_item"):
                return None, "a constant"
            if above.type == "function_item":
                break
        owner = node if genre == "FnValue" else above
        if owner and any(child.type == "function_modifiers" and b"const" in child.text for child in owner.children):
            return None, "a constant function"
        return node, None

    def put(self, text, *mutants):
        self.out.append(text)
        self.length += len(text)
        for mutant in mutants:
            self.ranges.append((self.length - len(text), self.length, mutant["id"]))

    def switch(self, mutants, changed, original):
        """`(if on(N) { changed } else … { original })`; a mutant inside of the original is reached in the last branch alone."""
        begin = self.length
        self.put(b"(")
        for mutant in mutants:
            self.put(b"if crate::mutest::on(%d) { " % mutant["id"])
            self.put(changed(mutant), mutant)
            self.put(b" } else ")
        self.put(b"{ ")
        original()
        self.put(b" })")
        self.ranges += [(begin, self.length, mutant["id"]) for mutant in mutants]

    def visit(self, node):
        begin = self.length
        self.visit_inside(node)
        if node.type == "match_expression":
            # Without one of its arms the whole of it may not compile.
            arms = [(arm.start_byte, arm.end_byte, arm.type) for arm in node.child_by_field_name("body").children]
            deleted = [mutant["id"] for arm in arms if arm[2] == "match_arm" for mutant in self.sites.get(arm, ())]
            self.ranges += [(begin, self.length, number) for number in deleted]

    def visit_inside(self, node):
        inside = [mark for mark in self.marks if node.start_byte <= mark < node.end_byte]
        mutants = self.sites.get((node.start_byte, node.end_byte, node.type), [])
        field = node.child_by_field_name
        if not inside:
            self.put(node.text)
        elif not mutants:
            self.children(node)
        elif node.type in ("binary_expression", "compound_assignment_expr"):
            left, operator, right = field("left"), field("operator"), field("right")

            def original():
                self.put(b"(")
                self.visit(left)
                self.put(b") " + operator.text + b" (")
                self.visit(right)
                self.put(b")")

            self.switch(mutants, lambda m: b"(%s) %s (%s)" % (left.text, m["replacement"].encode(), right.text), original)
        elif node.type == "unary_expression":
            operand = node.children[-1]
            self.switch(mutants, lambda m: b"(%s)" % operand.text, lambda: self.children(node))
        elif node.type == "function_item":
            early = b"if crate::mutest::on(%d) { return %s; }"
            self.children(node, field("body"), [(early % (m["id"], m["replacement"].encode()), m) for m in mutants])
        elif node.type in ("field_initializer", "shorthand_field_initializer"):
            name = (field("field") or node.children[0]).text
            base = next(child for child in node.parent.children if child.type == "base_field_initializer").children[-1].text
            owner = node.parent.parent.child_by_field_name("name").text
            self.put(name + b": ")
            from_base = b"{ let base: %s = %s; base.%s }" % (owner, base, name)
            self.switch(mutants, lambda m: from_base, lambda: self.visit(field("value") or node.children[0]))
        elif node.type == "match_arm":
            pattern = field("pattern")
            if not pattern.child_by_field_name("condition"):
                self.children(node, pattern, [(b" if !crate::mutest::on(%d)" % m["id"], m) for m in mutants], before=False)
            else:
                self.deleted = mutants
                self.children(node)
        elif node.type == "match_pattern":
            self.guard(node, mutants)

    def guard(self, node, mutants):
        guard = node.child_by_field_name("condition")
        self.put(self.source[node.start_byte : guard.start_byte])
        for mutant in self.deleted:
            self.put(b"!crate::mutest::on(%d) && " % mutant["id"], mutant)
        self.deleted = []
        always = [m for m in mutants if m["replacement"] == "true"]
        never = [m for m in mutants if m["replacement"] == "false"]
        has_let = guard.type in ("let_condition", "let_chain")
        for mutant in always if has_let else []:
            self.misplaced[mutant["id"]] = "`||` beside `let` does not compile"
        for mutant in never:
            self.put(b"!crate::mutest::on(%d) && " % mutant["id"], mutant)
        self.put(b"" if has_let else b"(")
        for mutant in [] if has_let else always:
            self.put(b"crate::mutest::on(%d) || " % mutant["id"], mutant)
        self.put(b"" if has_let else b"(")
        self.visit(guard)
        self.put(b"" if has_let else b"))")

    deleted = []

    def children(self, node, mark=None, extra=(), before=True):
        """The node as it is, but for mutants inside, and for what is put behind the opening brace of a child or behind the child."""
        if node.type == "match_pattern" and self.deleted:
            return self.guard(node, [])
        at = node.start_byte
        for child in node.children:
            self.put(self.source[at : child.start_byte])
            if mark and child.id == mark.id and before:
                self.put(b"{")
                for text, mutant in extra:
                    self.put(text, mutant)
                at = child.start_byte + 1
                for inner in child.children[1:]:
                    self.put(self.source[at : inner.start_byte])
                    self.visit(inner)
                    at = inner.end_byte
            else:
                self.visit(child)
                for text, mutant in extra if mark and child.id == mark.id else ():
                    self.put(text, mutant)
            at = child.end_byte
        self.put(self.source[at : node.end_byte])
