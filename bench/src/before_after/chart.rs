//! Curves over time as SVG, coloured by the page's style sheet so that they follow light and dark.

use std::fmt::Write as _;

const WIDTH: f64 = 420.0;
const HEIGHT: f64 = 210.0;
const LEFT: f64 = 44.0;
const RIGHT: f64 = 8.0;
const TOP: f64 = 20.0;
const BOTTOM: f64 = 24.0;
/// More points than pixels cannot be seen.
const MOST_POINTS: usize = 400;

/// One curve. Its number is its colour.
pub(crate) struct Curve {
    pub(crate) name: &'static str,
    /// Time in seconds and value.
    pub(crate) points: Vec<(f64, f64)>,
}

/// A time that is marked, with its label.
pub(crate) struct Span {
    pub(crate) from: f64,
    pub(crate) to: f64,
    pub(crate) label: String,
}

/// One chart.
pub(crate) struct Chart<'a> {
    /// For those who cannot see it.
    pub(crate) title: String,
    pub(crate) unit: &'static str,
    /// The greatest value of the axis, so that charts beside each other can be compared.
    pub(crate) most: f64,
    pub(crate) seconds: f64,
    pub(crate) curves: &'a [Curve],
    pub(crate) spans: &'a [Span],
}

impl Chart<'_> {
    pub(crate) fn svg(&self) -> String {
        let step = nice(self.most / 4.0);
        let most = (self.most / step).ceil().max(1.0) * step;
        let x = |seconds: f64| LEFT + (WIDTH - LEFT - RIGHT) * seconds / self.seconds.max(f64::EPSILON);
        let y = |value: f64| TOP + (HEIGHT - TOP - BOTTOM) * (1.0 - value / most);
        let (floor, right) = (y(0.0), WIDTH - RIGHT);
        let mut svg = String::new();
        let mut add = |text: std::fmt::Arguments| svg.write_fmt(text).expect("memory takes every text");
        add(format_args!(
            "<svg class=\"chart\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{title}\" data-unit=\"{unit}\" \
             data-left=\"{LEFT}\" data-right=\"{right}\" data-seconds=\"{seconds:.3}\">",
            title = self.title,
            unit = self.unit,
            seconds = self.seconds,
        ));
        for span in self.spans {
            let (from, to) = (x(span.from), x(span.to));
            // One that takes no time at this scale is seen all the same.
            let width = (to - from).max(1.5);
            add(format_args!(
                "<rect class=\"span\" x=\"{from:.1}\" y=\"{TOP}\" width=\"{width:.1}\" height=\"{:.1}\"/>\
                 <text class=\"label\" x=\"{from:.1}\" y=\"{:.1}\">{}</text>",
                floor - TOP,
                TOP - 6.0,
                span.label
            ));
        }
        for tick in 0..=(most / step).round() as u32 {
            let value = f64::from(tick) * step;
            add(format_args!(
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{right}\" y1=\"{0:.1}\" y2=\"{0:.1}\"/>\
                 <text class=\"tick\" x=\"{1}\" y=\"{2:.1}\" text-anchor=\"end\">{3}</text>",
                y(value),
                LEFT - 5.0,
                y(value) + 3.5,
                number(value)
            ));
        }
        let step = nice(self.seconds / 5.0);
        for tick in 0..=(self.seconds / step) as u32 {
            let seconds = f64::from(tick) * step;
            add(format_args!(
                "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{} s</text>",
                x(seconds).min(right - 10.0),
                HEIGHT - 6.0,
                number(seconds)
            ));
        }
        for (number, curve) in self.curves.iter().enumerate() {
            let points: Vec<String> =
                thinned(&curve.points).map(|(at, value)| format!("{:.1},{:.1}", x(at), y(value))).collect();
            add(format_args!(
                "<polyline class=\"curve c{number}\" points=\"{}\" data-name=\"{}\" data-points=\"{}\"/>",
                points.join(" "),
                curve.name,
                thinned(&curve.points).map(|(at, value)| format!("{at:.2},{value:.2}")).collect::<Vec<_>>().join(" "),
            ));
        }
        add(format_args!("<line class=\"cross\" y1=\"{TOP}\" y2=\"{floor:.1}\" visibility=\"hidden\"/></svg>"));
        svg
    }
}

/// At most [`MOST_POINTS`]; of those that fall together the greatest, so that no peak is lost.
fn thinned(points: &[(f64, f64)]) -> impl Iterator<Item = (f64, f64)> {
    let together = points.len().div_ceil(MOST_POINTS).max(1);
    points.chunks(together).filter_map(|chunk| chunk.iter().copied().max_by(|left, right| left.1.total_cmp(&right.1)))
}

/// The least of 1, 2 and 5 times a power of ten that is not less.
fn nice(value: f64) -> f64 {
    if value <= 0.0 || !value.is_finite() {
        return 1.0;
    }
    let power = 10_f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= value * 0.999).unwrap_or(power)
}

fn number(value: f64) -> String {
    match value {
        value if value >= 10_000.0 => format!("{}k", value / 1_000.0),
        value if value.fract().abs() < 1e-9 => format!("{value:.0}"),
        value => format!("{value:.1}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        assert_eq!([0.7, 1.0, 13.0, 22.0, 60.0].map(nice), [1.0, 1.0, 20.0, 50.0, 100.0]);
        assert_eq!([0.0, f64::NAN].map(nice), [1.0, 1.0]);
    }

    #[test]
    fn a_peak_is_drawn_however_many_points_there_are() {
        let mut points: Vec<_> = (0..10_000).map(|at| (f64::from(at), 1.0)).collect();
        points[4_321].1 = 99.0;
        let thinned: Vec<_> = thinned(&points).collect();
        assert!(thinned.len() <= MOST_POINTS && thinned.contains(&(4_321.0, 99.0)));
    }

    #[test]
    fn an_empty_chart_is_drawn() {
        let chart = Chart { title: "t".into(), unit: "MiB", most: 0.0, seconds: 0.0, curves: &[], spans: &[] };
        let svg = chart.svg();
        assert!(svg.ends_with("</svg>") && !svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }
}
