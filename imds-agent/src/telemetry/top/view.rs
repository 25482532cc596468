//! Draws the model in a terminal of any size.

use ratatui::{
    Frame,
    layout::{Constraint, Layout, Rect},
    style::{Color, Modifier, Style},
    text::Line,
    widgets::{Block, Borders, Cell, Clear, Paragraph, Row as Cells, Table},
};

use super::model::{Model, Row};

const EVENTS: u16 = 10;
const KEYS: [&str; 6] = [
    "q, Esc, Ctrl-C  quit",
    "s               sort by denied/s, denied or name",
    "p, space        pause or resume",
    "arrows, PgUp, PgDn, Home, End",
    "                scroll",
    "?               show or hide this",
];

pub(crate) fn draw(frame: &mut Frame<'_>, model: &Model) {
    let header = model.header.len() + usize::from(model.problem.is_some());
    let area = frame.area();
    let events = EVENTS.min(area.height / 3);
    let [top, table, bottom, foot] = Layout::vertical([
        Constraint::Length(u16::try_from(header).unwrap_or(u16::MAX)),
        Constraint::Min(0),
        Constraint::Length(events),
        Constraint::Length(1),
    ])
    .areas(area);
    draw_header(frame, model, top);
    draw_table(frame, model, table);
    draw_events(frame, model, bottom);
    let state = if model.is_paused { "paused   " } else { "" };
    let line = format!("{state}sorted by {}   q quit  s sort  p pause  ? keys", model.sort.name());
    frame.render_widget(Paragraph::new(line).style(Modifier::DIM), foot);
    if model.shows_keys {
        draw_keys(frame, area);
    }
}

fn draw_header(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let mut lines: Vec<_> = model.header.iter().map(|line| Line::raw(line.as_str())).collect();
    if let Some((problem, others)) = &model.problem {
        let more = if *others == 0 { String::new() } else { format!(" (and {others} more)") };
        let text = format!("PROBLEM {problem}{more}: see imds-agent status");
        lines.push(Line::styled(text, Style::new().fg(Color::Red).add_modifier(Modifier::BOLD)));
    }
    frame.render_widget(Paragraph::new(lines), area);
}

fn draw_table(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let has_pods = model.rows.iter().any(|row| row.pod.is_some());
    let mut titles = vec!["INTERFACE", "INDEX", "ROLE", "DENIED/S", "AUDITED/S", "EXEMPT/S", "DENIED"];
    let mut widths = [15, 6, 7, 9, 9, 9, 10].map(Constraint::Length).to_vec();
    if has_pods {
        titles.push("POD");
        widths.push(Constraint::Fill(1));
    }
    let header = Cells::new(titles).style(Modifier::REVERSED);
    let rows = model.rows.iter().skip(model.offset).map(|row| cells(row, has_pods));
    frame.render_widget(Table::new(rows, widths).header(header), area);
}

fn cells(row: &Row, has_pods: bool) -> Cells<'_> {
    let index = if row.index == 0 { String::new() } else { row.index.to_string() };
    let [denied, audited, exempt] = [row.denied, row.audited, row.exempt].map(|rate| format!("{rate:.1}"));
    let mut cells = vec![
        Cell::new(row.name.as_str()),
        Cell::new(index),
        Cell::new(row.role.as_str()),
        Cell::new(denied),
        Cell::new(audited),
        Cell::new(exempt),
        Cell::new(row.counts.denied.packets.to_string()),
    ];
    if has_pods {
        cells.push(Cell::new(row.pod.as_deref().unwrap_or_default()));
    }
    let style = if row.denied > 0.0 { Style::new().fg(Color::Yellow) } else { Style::new() };
    Cells::new(cells).style(style)
}

fn draw_events(frame: &mut Frame<'_>, model: &Model, area: Rect) {
    let block = Block::new().borders(Borders::TOP).title(" events ");
    let room = usize::from(block.inner(area).height);
    let skipped = model.events.len().saturating_sub(room);
    let lines: Vec<_> = model.events.iter().skip(skipped).map(|event| Line::raw(event.as_str())).collect();
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

fn draw_keys(frame: &mut Frame<'_>, area: Rect) {
    let preferred = Rect { x: 2, y: 1, width: 54, height: 8 };
    let area = preferred.intersection(area);
    frame.render_widget(Clear, area);
    let lines = KEYS.map(Line::raw).to_vec();
    frame.render_widget(Paragraph::new(lines).block(Block::bordered().title(" keys ")), area);
}

#[cfg(test)]
mod tests {
    use ratatui::{Terminal, backend::TestBackend};

    use super::*;
    use crate::datapath::maps::counters::{Count, Counts};

    fn screen(model: &Model, width: u16, height: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, model)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let line = |y| (0..width).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..height).map(line).collect()
    }

    fn model() -> Model {
        let row = |name: &str, index, denied: u64, rate: f64, pod: Option<&str>| Row {
            name: name.to_owned(),
            index,
            role: if index == 0 { String::new() } else { "pod".to_owned() },
            pod: pod.map(str::to_owned),
            counts: Counts { denied: Count { packets: denied, bytes: 0 }, ..Counts::default() },
            denied: rate,
            ..Row::default()
        };
        let mut model = Model {
            header: vec!["mode enforce".to_owned(), "agent running, pid 7".to_owned()],
            problem: Some(("veth1: from_pod is not enforced".to_owned(), 1)),
            rows: vec![row("veth0", 4, 12, 1.5, Some("tools/web")), row("(sockets)", 0, 3, 0.0, None)],
            ..Model::default()
        };
        model.add_events((0..9).map(|number| format!("event {number}")));
        model
    }

    #[test]
    fn full_view_in_80_columns() {
        let expected = [
            "mode enforce",
            "agent running, pid 7",
            "PROBLEM veth1: from_pod is not enforced (and 1 more): see imds-agent status",
            "INTERFACE       INDEX  ROLE    DENIED/S  AUDITED/S EXEMPT/S  DENIED     POD",
            "veth0           4      pod     1.5       0.0       0.0       12         tools/web",
            "(sockets)                      0.0       0.0       0.0       3",
            "",
            "",
            "",
            " events ────────────────────────────────────────────────────────────────────────────────",
            "event 6",
            "event 7",
            "event 8",
            "sorted by denied/s   q quit  s sort  p pause  ? keys",
        ];
        let mut screen = screen(&model(), 88, 14);
        screen[9] = screen[9].trim_start_matches('─').to_owned();
        assert_eq!(screen, expected);
    }

    #[test]
    fn reduced_view_in_small_terminals() {
        let mut model = model();
        model.shows_keys = true;
        model.is_paused = true;
        model.apply(super::super::Command::Last);
        for (width, height) in [(0, 0), (1, 1), (3, 2), (10, 3), (20, 5), (40, 8), (300, 100)] {
            let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
            terminal.draw(|frame| draw(frame, &model)).unwrap();
        }
        let screen = screen(&model, 60, 12);
        assert!(screen[1].contains(" keys ") && screen[2].contains("q, Esc"), "{screen:#?}");
        assert!(screen[11].starts_with("paused   sorted by"), "{screen:#?}");
    }
}
