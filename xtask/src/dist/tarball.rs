//! Archives with the same bytes for the same files: sorted, of root, with one time of change.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use flate2::{Compression, write::GzEncoder};

use super::{
    VERSION,
    contents::{Contents, File},
};
use crate::{arch::Arch, build};

/// Writes the tarball of one architecture to `dir`. Below its directory, each file has the path at which it is installed.
pub(super) fn write(arch: Arch, contents: &Contents, dir: &Path) -> Result<PathBuf> {
    let name = format!("imds-agent-{VERSION}-linux-{}", arch.debian());
    let below = |file: &File| File { path: format!("{name}/{}", file.path), ..file.clone() };
    let files: Vec<_> = contents.files.iter().map(below).collect();
    let path = dir.join(format!("{name}.tar.gz"));
    fs::write(&path, gzip(&tar(&files, build::time()?)?)?)
        .with_context(|| format!("failed to write {}", path.display()))?;
    Ok(path)
}

/// Returns an archive of `files` in their order, without entries for directories: unpacked below /, such entries would
/// change the machine's own directories.
pub(super) fn tar(files: &[File], time: u64) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for File { path, mode, data } in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(*mode);
        header.set_mtime(time);
        header.set_uid(0);
        header.set_gid(0);
        header.set_size(data.len() as u64);
        tar.append_data(&mut header, path, data.as_slice())
            .with_context(|| format!("failed to pack {path}"))?;
    }
    Ok(tar.into_inner()?)
}

/// Compresses `data`. The header contains neither name nor time.
pub(super) fn gzip(data: &[u8]) -> Result<Vec<u8>> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(data)?;
    Ok(gzip.finish()?)
}
