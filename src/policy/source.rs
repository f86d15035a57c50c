//! Reads a policy folder within limits, and parses its documents with all their errors.
//!
//! A folder consists of YAML files and of the key files that its documents name. The reader opens no other file, and no file
//! outside the folder. It checks each document by itself only. Look next at [`document`](super::document), then at
//! [`validate`](super::validate).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::model::limits::{POLICY_BYTES_MAX, POLICY_FILE_BYTES_MAX, POLICY_FILES_MAX};

use super::diagnostic::sort_and_limit;
use super::document::{Document, KeyFiles, key_file_reference, read_document, resolve_relative_path};
use super::{Error, yaml};

pub use super::diagnostic::{Diagnostic, Severity};

/// The maximum depth of a policy folder.
const FOLDER_NESTING_MAX: usize = 16;

/// A file of a policy folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// The path relative to the folder, with `/` as separator. Files that end in `.yaml` or `.yml` hold documents; all others
    /// hold keys.
    pub path: String,
    /// The content in bytes.
    pub content: Vec<u8>,
}

/// The result of [`parse_files`].
#[derive(Clone, Debug, Default)]
pub struct ParsedPolicy {
    /// The documents, in the order of the files and of their positions in a file. Incomplete if there is an error.
    pub documents: Vec<Document>,
    /// The mistakes in single documents.
    pub diagnostics: Vec<Diagnostic>,
}

impl ParsedPolicy {
    /// Whether any diagnostic is an error, which refuses the policy.
    pub fn has_errors(&self) -> bool {
        self.diagnostics.iter().any(Diagnostic::is_error)
    }
}

/// Reads a policy folder or a single policy file. The result holds the YAML files, sorted by path, and then the key files that
/// they name.
///
/// Files and folders whose names begin with a dot are skipped. A link may point to a file inside the folder, as in mounted
/// configuration.
///
/// # Errors
/// - A file cannot be read, or is outside the folder.
/// - A limit is exceeded: [`POLICY_FILES_MAX`], [`POLICY_FILE_BYTES_MAX`] or [`POLICY_BYTES_MAX`].
/// - The folder holds no policy.
pub fn read_folder(path: &Path) -> Result<Vec<SourceFile>, Error> {
    let root = path.canonicalize().map_err(|source| read_error(path, source))?;
    let mut folder = FolderReader { display_path: path, root: root.clone(), bytes: 0, files: BTreeMap::new() };
    if root.is_dir() {
        folder.walk_directory(&root, 0)?;
    } else {
        let name = path.file_name().and_then(|name| name.to_str()).filter(|name| is_yaml(name));
        let Some(name) = name else {
            return Err(not_policy_error(path, "its name must end in `.yaml` or `.yml`"));
        };
        folder.root = root.parent().unwrap_or(&root).to_path_buf();
        folder.add_file(name.to_owned(), &root)?;
    }
    if folder.files.is_empty() {
        return Err(Error::EmptyFolder { path: path.display().to_string() });
    }
    let documents = std::mem::take(&mut folder.files);
    let named: BTreeSet<String> = documents.iter().flat_map(|(path, content)| referenced_key_files(path, content)).collect();
    for name in named.into_iter().filter(|name| !documents.contains_key(name)) {
        // A missing key file is an error of the document that names it; `parse_files` reports it with its line.
        let file = folder.root.join(&name);
        if file.exists() {
            folder.add_file(name, &file)?;
        }
    }
    let files = documents.into_iter().chain(folder.files);
    Ok(files.map(|(path, content)| SourceFile { path, content }).collect())
}

/// Parses the documents of the files, each by itself, and collects all their mistakes.
pub fn parse_files(files: &[SourceFile]) -> ParsedPolicy {
    let mut parsed = ParsedPolicy::default();
    let key_files = KeyFiles::new(files.iter().map(|file| (file.path.as_str(), file.content.as_slice())));
    for file in files.iter().filter(|file| is_yaml(&file.path)) {
        for node in yaml::parse_documents(&file.content, &file.path, &mut parsed.diagnostics) {
            parsed.documents.extend(read_document(&node, &file.path, &key_files, &mut parsed.diagnostics));
        }
    }
    parsed.diagnostics = sort_and_limit(parsed.diagnostics);
    parsed
}

fn is_yaml(path: &str) -> bool {
    path.ends_with(".yaml") || path.ends_with(".yml")
}

/// The key files that the documents of a file name.
fn referenced_key_files(path: &str, content: &[u8]) -> Vec<String> {
    // A file without the word `file` names no key file, so it is not parsed a second time.
    if !content.windows(4).any(|window| window == b"file") {
        return Vec::new();
    }
    let nodes = yaml::parse_documents(content, path, &mut Vec::new());
    nodes.iter().filter_map(key_file_reference).filter_map(|name| resolve_relative_path(path, name).ok()).collect()
}

/// Collects the files of a folder and enforces the limits.
struct FolderReader<'a> {
    /// The path as the caller wrote it, for messages.
    display_path: &'a Path,
    root: PathBuf,
    bytes: usize,
    files: BTreeMap<String, Vec<u8>>,
}

impl FolderReader<'_> {
    /// Adds all YAML files of a folder and its subfolders.
    fn walk_directory(&mut self, folder: &Path, depth: usize) -> Result<(), Error> {
        if depth > FOLDER_NESTING_MAX {
            return Err(Error::TooLarge {
                path: folder.display().to_string(),
                limit: format!("{FOLDER_NESTING_MAX} folders deep"),
            });
        }
        for entry in fs::read_dir(folder).map_err(|source| read_error(folder, source))? {
            let entry = entry.map_err(|source| read_error(folder, source))?;
            let path = entry.path();
            let name = entry.file_name();
            let Some(name) = name.to_str() else {
                return Err(not_policy_error(&path, "its name is not UTF-8"));
            };
            if name.starts_with('.') {
                continue;
            }
            let kind = entry.file_type().map_err(|source| read_error(&path, source))?;
            if kind.is_dir() {
                self.walk_directory(&path, depth + 1)?;
            } else if is_yaml(name) {
                let relative = path.strip_prefix(&self.root).ok().and_then(Path::to_str).map(|path| path.replace('\\', "/"));
                self.add_file(relative.unwrap_or_else(|| name.to_owned()), &path)?;
            } else if kind.is_symlink() && path.is_dir() {
                return Err(not_policy_error(&path, "it is a link to a folder; name the folder itself, or copy it"));
            }
        }
        Ok(())
    }

    /// Adds a file. It must be a regular file inside the folder.
    fn add_file(&mut self, relative: String, file: &Path) -> Result<(), Error> {
        let target = file.canonicalize().map_err(|source| read_error(file, source))?;
        if !target.starts_with(&self.root) {
            return Err(Error::EscapesFolder { path: file.display().to_string() });
        }
        // Opening a pipe would block forever.
        if !target.metadata().map_err(|source| read_error(file, source))?.is_file() {
            return Err(not_policy_error(file, "it is not a regular file"));
        }
        let too_large = |limit: String| Error::TooLarge { path: file.display().to_string(), limit };
        let opened = fs::File::open(&target).map_err(|source| read_error(file, source))?;
        let mut content = Vec::new();
        opened.take(POLICY_FILE_BYTES_MAX as u64 + 1).read_to_end(&mut content).map_err(|source| read_error(file, source))?;
        if content.len() > POLICY_FILE_BYTES_MAX {
            return Err(too_large(format!("{POLICY_FILE_BYTES_MAX} bytes a file")));
        }
        self.bytes += content.len();
        self.files.insert(relative, content);
        if self.bytes > POLICY_BYTES_MAX || self.files.len() > POLICY_FILES_MAX {
            let limit = format!("{POLICY_BYTES_MAX} bytes in {POLICY_FILES_MAX} files");
            return Err(Error::TooLarge { path: self.display_path.display().to_string(), limit });
        }
        Ok(())
    }
}

fn read_error(path: &Path, source: std::io::Error) -> Error {
    Error::Read { path: path.display().to_string(), source }
}

fn not_policy_error(path: &Path, problem: &'static str) -> Error {
    Error::NotPolicy { path: path.display().to_string(), problem }
}
