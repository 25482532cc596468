//! Optional plots in SVG format.

use std::{env, error::Error, path::PathBuf};

use plotters::prelude::{
    ChartBuilder, Circle, Color as _, IntoDrawingArea as _, IntoLogRange as _, IntoSegmentedCoord as _,
    LineSeries, PathElement, RGBColor, Rectangle, SVGBackend, SegmentValue, SeriesLabelPosition, Text, WHITE,
};

/// Environment variable with the directory of the plots. Without it, no plots are written.
const DIRECTORY: &str = "IMDS_BENCH_PLOTS";
const WIDTH: u32 = 900;
const FONT: (&str, u32) = ("sans-serif", 14);
const TITLE: (&str, u32) = ("sans-serif", 17);
const OTHERS: RGBColor = RGBColor(165, 165, 165);
const COLORS: [RGBColor; 4] =
    [RGBColor(31, 97, 141), RGBColor(202, 111, 30), RGBColor(30, 132, 73), RGBColor(118, 68, 138)];

/// Draws one bar per name. `axis` names the value and its unit. Bars of the agent have a different color.
#[allow(dead_code, reason = "each benchmark has one kind of plot")]
pub(crate) fn bars(name: &str, title: &str, axis: &str, bars: &[(&str, f64, bool)]) {
    let draw = |path: PathBuf| -> Result<(), Box<dyn Error>> {
        let count = bars.len();
        let height = 110 + 28 * u32::try_from(count)?;
        let root = SVGBackend::new(&path, (WIDTH, height)).into_drawing_area();
        root.fill(&WHITE)?;
        let most = bars.iter().map(|bar| bar.1).fold(0.0, f64::max);
        let mut chart = ChartBuilder::on(&root)
            .caption(title, TITLE)
            .margin(8)
            .x_label_area_size(48)
            .y_label_area_size(290)
            .build_cartesian_2d(0.0..most * 1.1, (0..count).into_segmented())?;
        // The first bar is at the top.
        let at = |row: usize| count - 1 - row;
        let label = |row: &SegmentValue<usize>| match row {
            SegmentValue::CenterOf(row) if *row < count => bars[at(*row)].0.to_owned(),
            _ => String::new(),
        };
        let mut mesh = chart.configure_mesh();
        mesh.disable_y_mesh().y_labels(count).y_label_formatter(&label).x_desc(axis);
        mesh.label_style(FONT).axis_desc_style(FONT).draw()?;
        chart.draw_series(bars.iter().enumerate().map(|(row, &(_, value, is_ours))| {
            let color = if is_ours { COLORS[0] } else { OTHERS };
            let corners = [(0.0, SegmentValue::Exact(at(row))), (value, SegmentValue::Exact(at(row) + 1))];
            let mut bar = Rectangle::new(corners, color.filled());
            bar.set_margin(4, 4, 0, 0);
            bar
        }))?;
        chart.draw_series(bars.iter().enumerate().map(|(row, &(_, value, _))| {
            Text::new(format!(" {value:.0}"), (value, SegmentValue::CenterOf(at(row))), FONT)
        }))?;
        Ok(root.present()?)
    };
    to_file(name, draw);
}

/// Draws lines through points on logarithmic axes. `axes` names the values of the horizontal and of the vertical axis, with
/// their units.
#[allow(dead_code, reason = "each benchmark has one kind of plot")]
pub(crate) fn lines(name: &str, title: &str, axes: [&str; 2], lines: &[(&str, Vec<(f64, f64)>)]) {
    let draw = |path: PathBuf| -> Result<(), Box<dyn Error>> {
        let root = SVGBackend::new(&path, (WIDTH, 420)).into_drawing_area();
        root.fill(&WHITE)?;
        let points = || lines.iter().flat_map(|(_, points)| points);
        let range = |of: fn(&(f64, f64)) -> f64| {
            let values = || points().map(of);
            values().fold(f64::MAX, f64::min) * 0.8..values().fold(0.0, f64::max) * 1.25
        };
        let mut chart = ChartBuilder::on(&root)
            .caption(title, TITLE)
            .margin(8)
            .x_label_area_size(48)
            .y_label_area_size(75)
            .build_cartesian_2d(range(|point| point.0).log_scale(), range(|point| point.1).log_scale())?;
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(axes[0]).y_desc(axes[1]).label_style(FONT).axis_desc_style(FONT).draw()?;
        for ((label, points), color) in lines.iter().zip(COLORS) {
            chart
                .draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(2)))?
                .label(*label)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
            chart.draw_series(points.iter().map(|&point| Circle::new(point, 3, color.filled())))?;
        }
        let mut legend = chart.configure_series_labels();
        legend.position(SeriesLabelPosition::MiddleLeft).label_font(FONT).background_style(WHITE).draw()?;
        Ok(root.present()?)
    };
    to_file(name, draw);
}

fn to_file(name: &str, draw: impl FnOnce(PathBuf) -> Result<(), Box<dyn Error>>) {
    if let Some(directory) = env::var_os(DIRECTORY) {
        draw(PathBuf::from(directory).join(name).with_extension("svg")).expect("draw a plot");
    }
}
