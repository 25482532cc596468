//! Tables.

/// A table with a head.
pub(super) fn table(head: Vec<String>, rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let ruler = head.iter().map(|_| "---".to_owned()).collect();
    let lines: Vec<_> = [head, ruler].into_iter().chain(rows).map(|cells| line(&cells)).collect();
    lines.join("\n")
}

fn line(cells: &[String]) -> String {
    let cells: Vec<_> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
    format!("| {} |", cells.join(" | ")).replace("|  |", "| |")
}

/// Text as a program wrote it.
pub(super) fn code(text: &str) -> String {
    format!("`{}`", text.replace('`', "'"))
}
