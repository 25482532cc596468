//! Links between the documents, and the table of contents of the site.

use std::path::{Path, PathBuf};

use crate::{
    lacks_repository,
    markdown::{Document, read_directory, repository},
};

/// Removes `.` and `..` from a path without following symlinks.
fn normalize(path: &Path) -> PathBuf {
    let mut normal = PathBuf::new();
    for part in path {
        if part == ".." {
            normal.pop();
        } else if part != "." {
            normal.push(part);
        }
    }
    normal
}

fn documents() -> Vec<Document> {
    [(".", false), (".github", true), ("docs", true)]
        .into_iter()
        .flat_map(|(directory, is_deep)| read_directory(directory, is_deep))
        .collect()
}

#[test]
fn links_and_anchors_resolve() {
    if lacks_repository() {
        return;
    }
    let documents = documents();
    let (mut count, mut broken) = (0, Vec::new());
    for document in &documents {
        for link in &document.links {
            if link.text.contains("://") || link.text.starts_with("mailto:") {
                continue;
            }
            count += 1;
            let (path, anchor) = link.text.split_once('#').unwrap_or((&link.text, ""));
            let target = match path {
                "" => document.path.clone(),
                _ => normalize(&document.path.parent().unwrap_or(Path::new("")).join(path)),
            };
            let has_anchor = || {
                let target = documents.iter().find(|other| other.path == target);
                target.is_some_and(|target| target.anchors.iter().any(|other| other == anchor))
            };
            if !repository().join(&target).exists() || !anchor.is_empty() && !has_anchor() {
                broken.push(format!("{}: {}", link.at, link.text));
            }
        }
    }
    assert!(count > 150, "{count} links");
    assert!(broken.is_empty(), "{broken:#?}");
}

#[test]
fn every_page_is_in_the_table_of_contents() {
    if lacks_repository() {
        return;
    }
    let summary = Document::read("docs/SUMMARY.md".as_ref());
    let listed: Vec<_> = summary.links.iter().map(|link| Path::new("docs").join(&link.text)).collect();
    let pages = read_directory("docs", true).into_iter().map(|page| page.path);
    let missing: Vec<_> =
        pages.filter(|page| !listed.contains(page) && page != Path::new("docs/SUMMARY.md")).collect();
    assert!(missing.is_empty(), "docs/SUMMARY.md lacks {missing:?}");
}
