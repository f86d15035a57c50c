//! Finds cycles in a graph: permission sets that include themselves, and agents that delegate back to themselves.
//!
//! The search is depth first and does not recurse, because a path may be as long as the policy is large. It follows each edge
//! once.

/// The maximum number of reported cycles. More reports would not help the author.
const CYCLES_MAX: usize = 100;

/// A path that returns to its start.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct GraphCycle {
    /// The nodes of the cycle in order, each once.
    nodes: Vec<usize>,
    /// The node whose edge closes the cycle. It is the last node.
    pub(super) closing_node: usize,
    /// The index of the closing edge among the edges of that node.
    pub(super) closing_edge: usize,
}

impl GraphCycle {
    /// The first nodes of the cycle, followed by the start again if `max` allows it.
    pub(super) fn first_nodes(&self, max: usize) -> impl Iterator<Item = usize> {
        self.nodes.iter().chain(self.nodes.first()).take(max).copied()
    }
}

/// Returns one cycle for each edge that closes one. `edges` holds the targets of each node; `None` is an edge to nowhere.
pub(super) fn find_cycles(edges: &[Vec<Option<usize>>]) -> Vec<GraphCycle> {
    let mut found = Vec::new();
    let mut done = vec![false; edges.len()];
    let mut on_path = vec![false; edges.len()];
    let is = |flags: &[bool], node: usize| flags.get(node).copied().unwrap_or(false);
    for start in 0..edges.len() {
        if is(&done, start) {
            continue;
        }
        let mut path: Vec<(usize, usize)> = vec![(start, 0)];
        set_flag(&mut on_path, start, true);
        while let Some((node, next)) = path.last_mut() {
            let (at, edge) = (*node, *next);
            *next += 1;
            match edges.get(at).and_then(|targets| targets.get(edge)) {
                None => {
                    set_flag(&mut done, at, true);
                    set_flag(&mut on_path, at, false);
                    path.pop();
                }
                Some(Some(target)) if is(&on_path, *target) => {
                    let nodes = path.iter().map(|(node, _)| *node).skip_while(|node| node != target).collect();
                    found.push(GraphCycle { nodes, closing_node: at, closing_edge: edge });
                    if found.len() == CYCLES_MAX {
                        return found;
                    }
                }
                Some(Some(target)) if *target < edges.len() && !is(&done, *target) => {
                    set_flag(&mut on_path, *target, true);
                    path.push((*target, 0));
                }
                Some(_) => {}
            }
        }
    }
    found
}

fn set_flag(flags: &mut [bool], node: usize, value: bool) {
    if let Some(flag) = flags.get_mut(node) {
        *flag = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn circles() {
        let check = |edges: &[&[usize]], expected: &[(&[usize], usize)]| {
            let edges: Vec<Vec<Option<usize>>> =
                edges.iter().map(|targets| targets.iter().map(|target| Some(*target)).collect()).collect();
            let found = find_cycles(&edges);
            let found: Vec<(&[usize], usize)> =
                found.iter().map(|circle| (circle.nodes.as_slice(), circle.closing_edge)).collect();
            assert_eq!(found, expected, "{edges:?}");
        };
        check(&[], &[]);
        check(&[&[1], &[2], &[]], &[]);
        check(&[&[0]], &[(&[0], 0)]);
        check(&[&[1], &[0]], &[(&[0, 1], 0)]);
        check(&[&[1], &[2], &[9, 1]], &[(&[1, 2], 1)]);
        check(&[&[1, 2], &[3], &[3], &[]], &[]);
        check(&[&[1], &[2], &[0, 1]], &[(&[0, 1, 2], 0), (&[1, 2], 1)]);
        let long: Vec<Vec<Option<usize>>> = (0..100_000).map(|node| vec![Some((node + 1) % 100_000)]).collect();
        assert_eq!(find_cycles(&long).len(), 1);
        let dense: Vec<Vec<Option<usize>>> = (0..300).map(|_| (0..300).map(Some).collect()).collect();
        assert_eq!(find_cycles(&dense).len(), CYCLES_MAX);
    }
}
