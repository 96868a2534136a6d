//! Flame graphs as SVG: one file that any browser shows, with a click to zoom.

use std::collections::BTreeMap;
use std::fmt::Write as _;

const WIDTH: f64 = 1200.0;
const ROW: usize = 17;
const HEAD: usize = 40;
/// Narrower boxes cannot be seen and would be most of the file.
const NARROWEST: f64 = 0.3;
/// Of the font, so that a name is cut where its box ends.
const CHARACTER: f64 = 7.0;

/// Click: the box takes the whole width. A click on the lowest one shows all again.
/// Paper and the ink on it, by day and by night; boxes have bright colours of their own, and dark names.
const STYLE: &str = ".paper{fill:#fffdf8}.ink{fill:#1c1e21}\
                     @media(prefers-color-scheme:dark){.paper{fill:#16181b}.ink{fill:#e6e8ea}}";

const SCRIPT: &str = "
document.querySelectorAll('g').forEach(function (box, _, all) {
  box.addEventListener('click', function () {
    var left = +box.dataset.x, width = +box.dataset.w, row = +box.dataset.row;
    all.forEach(function (g) {
      var x = +g.dataset.x, w = +g.dataset.w, below = +g.dataset.row < row;
      var inside = x >= left - 1e-6 && x + w <= left + width + 1e-6 && !below;
      var under = below && x <= left + 1e-6 && x + w >= left + width - 1e-6;
      g.style.display = inside || under ? '' : 'none';
      var to = under ? 0 : (x - left) / width * 1200, wide = under ? 1200 : w / width * 1200;
      var rect = g.querySelector('rect'), text = g.querySelector('text');
      rect.setAttribute('x', to); rect.setAttribute('width', wide);
      text.setAttribute('x', to + 3);
      var room = Math.floor((wide - 6) / 7), name = g.dataset.name;
      text.textContent = room < 3 ? '' : name.length <= room ? name : name.slice(0, room - 2) + '..';
    });
  });
});
";

/// A flame graph that grows stack by stack. The width of a box is a value, its colour what that value changed by.
#[derive(Debug)]
pub struct FlameGraph {
    title: String,
    unit: String,
    nodes: Vec<Node>,
}

#[derive(Debug, Default)]
struct Node {
    name: String,
    value: i128,
    change: i128,
    children: BTreeMap<String, usize>,
}

impl FlameGraph {
    /// An empty one. The unit is written behind values.
    pub fn new(title: &str, unit: &str) -> Self {
        let root = Node { name: "all".to_owned(), ..Node::default() };
        FlameGraph { title: title.to_owned(), unit: unit.to_owned(), nodes: vec![root] }
    }

    /// Adds a stack from the outermost function to the innermost with its value, which is drawn if it is above 0, and with
    /// how much of it is new: 0 in a graph of one profile, and negative for what was there before and is gone.
    pub fn add<'a>(&mut self, stack: impl IntoIterator<Item = &'a str>, value: i64, change: i64) {
        let (value, change) = (i128::from(value.max(0)), i128::from(change));
        let mut at = 0;
        self.nodes[at].count(value, change);
        for name in stack {
            at = match self.nodes[at].children.get(name) {
                Some(child) => *child,
                None => {
                    let child = self.nodes.len();
                    self.nodes.push(Node { name: name.to_owned(), ..Node::default() });
                    self.nodes[at].children.insert(name.to_owned(), child);
                    child
                }
            };
            self.nodes[at].count(value, change);
        }
    }

    /// The picture. Without a value above 0 it says so.
    pub fn svg(&self) -> String {
        let total = self.nodes[0].value;
        let is_difference = self.nodes.iter().any(|node| node.change != 0);
        let most = self.nodes.iter().map(|node| node.change.unsigned_abs()).max().unwrap_or(0).max(1);
        let mut boxes = Vec::new();
        let mut deepest = 0;
        let mut open = if total > 0 { vec![(0, 0.0, 0)] } else { Vec::new() };
        while let Some((index, x, row)) = open.pop() {
            let node = &self.nodes[index];
            let width = WIDTH * node.value as f64 / total as f64;
            if width < NARROWEST {
                continue;
            }
            deepest = deepest.max(row);
            boxes.push((node, x, width, row));
            let mut next = x;
            for child in node.children.values() {
                open.push((*child, next, row + 1));
                next += WIDTH * self.nodes[*child].value as f64 / total as f64;
            }
        }
        let height = HEAD + (deepest + 1) * ROW + 10;
        let mut svg = String::new();
        let mut write = |text: std::fmt::Arguments| svg.write_fmt(text).expect("memory takes every text");
        write(format_args!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} \
             {height}\" width=\"{WIDTH}\" height=\"{height}\" font-family=\"monospace\" font-size=\"11.6\">\n<style>{STYLE}</style>\n\
             <rect class=\"paper\" width=\"100%\" height=\"100%\"/>\n<text class=\"ink\" x=\"600\" y=\"24\" \
             text-anchor=\"middle\" font-size=\"16\">{}</text>\n",
            escape(&self.title)
        ));
        if boxes.is_empty() {
            write(format_args!(
                "<text class=\"ink\" x=\"600\" y=\"42\" text-anchor=\"middle\">nothing to draw</text>\n"
            ));
        }
        for (node, x, width, row) in boxes {
            let y = HEAD + (deepest - row) * ROW;
            let name = escape(&node.name);
            let percent = node.value as f64 * 100.0 / total as f64;
            let change = if is_difference { format!(", {:+}", node.change) } else { String::new() };
            let colour = if is_difference { change_colour(node.change, most) } else { name_colour(&node.name) };
            write(format_args!(
                "<g data-x=\"{x:.3}\" data-w=\"{width:.3}\" data-row=\"{row}\" data-name=\"{name}\"><title>{name} ({} {}, \
                 {percent:.2}%{change})</title><rect x=\"{x:.3}\" y=\"{y}\" width=\"{width:.3}\" height=\"{}\" \
                 fill=\"{colour}\" rx=\"2\"/><text x=\"{:.3}\" y=\"{}\">{}</text></g>\n",
                node.value,
                self.unit,
                ROW - 1,
                x + 3.0,
                y + 12,
                escape(&cut(&node.name, width))
            ));
        }
        write(format_args!("<script><![CDATA[{SCRIPT}]]></script>\n</svg>\n"));
        svg
    }
}

impl Node {
    fn count(&mut self, value: i128, change: i128) {
        self.value += value;
        self.change += change;
    }
}

/// As much of the name as fits into a box.
fn cut(name: &str, width: f64) -> String {
    let room = ((width - 6.0) / CHARACTER).max(0.0) as usize;
    match name.chars().count() {
        _ if room < 3 => String::new(),
        length if length <= room => name.to_owned(),
        _ => name.chars().take(room - 2).chain("..".chars()).collect(),
    }
}

/// A warm colour that a function keeps from graph to graph.
fn name_colour(name: &str) -> String {
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    format!("rgb({},{},{})", 205 + hash % 50, 90 + (hash >> 8) % 120, 40 + (hash >> 16) % 50)
}

/// Red for more, blue for less, the paler the smaller.
fn change_colour(change: i128, most: u128) -> String {
    let pale = 245 - (change.unsigned_abs() as f64 / most as f64 * 165.0) as u32;
    if change >= 0 { format!("rgb(250,{pale},{pale})") } else { format!("rgb({pale},{pale},250)") }
}

fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            c if c.is_control() => escaped.push(' '),
            c => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn boxes_are_as_wide_as_their_values() {
        let mut graph = FlameGraph::new("a <title>", "bytes");
        graph.add(["main", "Vec<u8>::with_capacity"], 300, 0);
        graph.add(["main"], 100, 0);
        graph.add(["other"], 400, 0);
        graph.add(["gone"], -5, 0);
        let svg = graph.svg();
        assert!(svg.contains("a &lt;title&gt;"), "{svg}");
        for part in [
            "data-x=\"0.000\" data-w=\"1200.000\" data-row=\"0\" data-name=\"all\"",
            "data-x=\"0.000\" data-w=\"600.000\" data-row=\"1\" data-name=\"main\"",
            "data-x=\"0.000\" data-w=\"450.000\" data-row=\"2\" data-name=\"Vec&lt;u8&gt;::with_capacity\"",
            "data-x=\"600.000\" data-w=\"600.000\" data-row=\"1\" data-name=\"other\"",
            "<title>main (400 bytes, 50.00%)</title>",
        ] {
            assert!(svg.contains(part), "{part} is not in {svg}");
        }
        assert!(!svg.contains("gone"), "nothing is there to be drawn");
    }

    #[test]
    fn a_difference_is_red_and_blue() {
        let mut graph = FlameGraph::new("d", "bytes");
        graph.add(["grew"], 100, 100);
        graph.add(["shrank"], 50, -50);
        graph.add(["same"], 50, 0);
        let svg = graph.svg();
        assert!(
            svg.contains("<title>grew (100 bytes, 50.00%, +100)</title>") && svg.contains("rgb(250,80,80)"),
            "{svg}"
        );
        assert!(svg.contains("shrank (50 bytes, 25.00%, -50)") && svg.contains("rgb(163,163,250)"), "{svg}");
        assert!(svg.contains("rgb(250,245,245)"), "{svg}");
    }

    #[test]
    fn an_empty_graph_says_so_and_a_deep_one_is_drawn() {
        assert!(FlameGraph::new("t", "bytes").svg().contains("nothing to draw"));
        let mut graph = FlameGraph::new("t", "bytes");
        graph.add(vec!["f"; 100_000], 1, 0);
        assert_eq!(graph.svg().matches("<g ").count(), 100_001);
    }

    #[test]
    fn a_name_is_cut_where_its_box_ends() {
        assert_eq!([cut("abcdef", 48.0), cut("abcdef", 41.0), cut("abcdef", 20.0)], ["abcdef", "abc..", ""]);
    }
}
