//! Reader for the Markdown that the documents use: code blocks, code spans, headings and links.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// The parts of a Markdown file that the tests check.
pub(crate) struct Document {
    /// Path below the repository.
    pub(crate) path: PathBuf,
    pub(crate) blocks: Vec<Block>,
    /// Text of each code span outside of blocks.
    pub(crate) spans: Vec<Text>,
    /// Target of each link.
    pub(crate) links: Vec<Text>,
    /// Anchor of each heading.
    pub(crate) anchors: Vec<String>,
}

/// A fenced or indented code block.
pub(crate) struct Block {
    /// File and first line, as compilers print them.
    pub(crate) at: String,
    /// Text of the last heading before the block.
    pub(crate) section: String,
    /// Language of a fenced block; `None` for an indented one.
    pub(crate) language: Option<String>,
    /// Lines without the indentation of the block.
    pub(crate) lines: Vec<String>,
}

/// A code span or the target of a link, with its place.
#[derive(Clone)]
pub(crate) struct Text {
    /// File and first line of the paragraph.
    pub(crate) at: String,
    pub(crate) text: String,
}

/// Returns the path of the repository.
pub(crate) fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Returns the Markdown files in a directory of the repository and, if `is_deep`, below it.
pub(crate) fn read_directory(directory: &str, is_deep: bool) -> Vec<Document> {
    let mut documents = Vec::new();
    for entry in fs::read_dir(repository().join(directory)).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let path = Path::new(directory).join(&name);
        if is_deep && entry.file_type().unwrap().is_dir() {
            documents.extend(read_directory(path.to_str().unwrap(), true));
        } else if path.extension().is_some_and(|extension| extension == "md") {
            documents.push(Document::read(&path));
        }
    }
    documents.sort_by(|one, other| one.path.cmp(&other.path));
    documents
}

impl Document {
    /// Reads a file of the repository.
    pub(crate) fn read(path: &Path) -> Self {
        let text = fs::read_to_string(repository().join(path)).unwrap();
        Self::parse(path.strip_prefix(".").unwrap_or(path), &text)
    }

    pub(crate) fn parse(path: &Path, text: &str) -> Self {
        let mut reader = Reader {
            document: Self {
                path: path.to_owned(),
                blocks: Vec::new(),
                spans: Vec::new(),
                links: Vec::new(),
                anchors: Vec::new(),
            },
            section: String::new(),
            paragraph: None,
            list_indent: 0,
            is_after_blank: true,
        };
        let mut lines = text.lines().enumerate().peekable();
        while let Some((number, line)) = lines.next() {
            let at = format!("{}:{}", path.display(), number + 1);
            let indent = line.len() - line.trim_start().len();
            if let Some(language) = line.trim_start().strip_prefix("```") {
                reader.end_paragraph();
                let body: Vec<_> =
                    lines.by_ref().map(|(_, line)| line).take_while(|line| line.trim() != "```").collect();
                reader.add_block(at, Some(language.to_owned()), &body, indent);
            } else if reader.starts_block(line, indent) {
                let mut body = vec![line];
                while let Some((_, next)) = lines.next_if(|(_, next)| {
                    next.trim().is_empty() || next.len() - next.trim_start().len() >= reader.list_indent + 4
                }) {
                    body.push(next);
                }
                reader.add_block(at, None, &body, reader.list_indent + 4);
                reader.is_after_blank = true;
            } else {
                reader.read_line(at, line, indent);
            }
        }
        reader.end_paragraph();
        reader.document
    }
}

struct Reader {
    document: Document,
    section: String,
    paragraph: Option<Text>,
    /// Column of the text of the current list item.
    list_indent: usize,
    is_after_blank: bool,
}

impl Reader {
    fn starts_block(&self, line: &str, indent: usize) -> bool {
        !line.trim().is_empty() && self.is_after_blank && indent >= self.list_indent + 4
    }

    fn add_block(&mut self, at: String, language: Option<String>, body: &[&str], indent: usize) {
        let mut lines: Vec<_> =
            body.iter().map(|line| line.get(indent..).unwrap_or_default().to_owned()).collect();
        while lines.last().is_some_and(String::is_empty) {
            lines.pop();
        }
        self.document.blocks.push(Block { at, section: self.section.clone(), language, lines });
    }

    fn read_line(&mut self, at: String, line: &str, indent: usize) {
        let text = line.trim();
        self.is_after_blank = text.is_empty();
        if text.is_empty() {
            return self.end_paragraph();
        }
        if let Some(width) = list_marker(text) {
            self.end_paragraph();
            self.list_indent = indent + width;
        } else if indent == 0 && self.paragraph.is_none() {
            self.list_indent = 0;
        }
        if text.starts_with('#') {
            self.end_paragraph();
            let heading = text.trim_start_matches('#').trim();
            heading.clone_into(&mut self.section);
            self.document.anchors.push(anchor(heading));
        }
        match &mut self.paragraph {
            Some(paragraph) => paragraph.text.extend([" ", text]),
            None => self.paragraph = Some(Text { at, text: text.to_owned() }),
        }
        // Rows of a table are paragraphs of their own.
        if text.starts_with('|') || text.starts_with('#') {
            self.end_paragraph();
        }
    }

    fn end_paragraph(&mut self) {
        let Some(paragraph) = self.paragraph.take() else { return };
        let (spans, rest) = code_spans(&paragraph.text);
        let at = &paragraph.at;
        self.document.spans.extend(spans.into_iter().map(|text| Text { at: at.clone(), text }));
        self.document.links.extend(links(&rest).map(|text| Text { at: at.clone(), text }));
    }
}

/// Returns the width of the marker if the line starts a list item.
fn list_marker(line: &str) -> Option<usize> {
    let digits = line.len() - line.trim_start_matches(|char: char| char.is_ascii_digit()).len();
    let is_item = line.starts_with("- ") || digits > 0 && line[digits..].starts_with(". ");
    is_item.then_some(if digits > 0 { digits + 2 } else { 2 })
}

/// Returns the code spans, and the text without them.
fn code_spans(paragraph: &str) -> (Vec<String>, String) {
    let (mut spans, mut rest) = (Vec::new(), String::new());
    let mut parts = paragraph.split('`');
    rest.push_str(parts.next().unwrap_or_default());
    while let (Some(span), Some(after)) = (parts.next(), parts.next()) {
        // In a row of a table, a bar in code is escaped.
        spans.push(span.replace("\\|", "|"));
        rest.push_str(after);
    }
    (spans, rest)
}

/// Returns the targets of inline links and images.
fn links(text: &str) -> impl Iterator<Item = String> {
    text.split("](").skip(1).filter_map(|after| Some(after.split_once(')')?.0.to_owned()))
}

/// Returns the anchor of a heading, as GitHub and `mdbook` derive it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|&char| char.is_alphanumeric() || "-_ ".contains(char));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn parts_of_a_document_are_found() {
    let text = "# A `b` c\n\nSee [d](e.md#f) and\n`g\nh`.\n\n    i\n\n     j\n\n1. K\n\n       l\n   m\n\n```toml\nn = 1\n```\n";
    let document = Document::parse(Path::new("x.md"), text);
    assert_eq!(document.anchors, ["a-b-c"]);
    assert_eq!(document.links.iter().map(|link| &*link.text).collect::<Vec<_>>(), ["e.md#f"]);
    assert_eq!(document.spans.iter().map(|span| &*span.text).collect::<Vec<_>>(), ["b", "g h"]);
    let blocks: Vec<_> = document
        .blocks
        .iter()
        .map(|block| (&*block.at, block.language.as_deref(), block.lines.join("|")))
        .collect();
    let expected = [("x.md:7", None, "i|| j"), ("x.md:13", None, "l"), ("x.md:16", Some("toml"), "n = 1")];
    assert_eq!(blocks, expected.map(|(at, language, lines)| (at, language, lines.to_owned())));
}
