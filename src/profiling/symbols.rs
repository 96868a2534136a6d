//! Names for the places of a profile, from the symbol tables and, where there is any, the debug information of the files.
//!
//! The files are mapped, read where needed and let go again: nothing stays in memory. The program itself is read through
//! `/proc/self/exe`, which leads to it also when an upgrade has replaced it.

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd as _;
use std::ptr;

use addr2line::gimli::{self, EndianSlice, RunTimeEndian};
use anyhow::Context as _;
use object::read::elf::{ElfFile64, ElfSymbol64};
use object::{Object as _, ObjectSection as _, ObjectSymbol as _, SymbolKind};

use super::objects::Objects;
use super::pprof::{Builder, Function, Line, Location, Mapping, Profile};

type Elf<'a> = ElfFile64<'a, object::Endianness>;
type Reader<'a> = EndianSlice<'a, RunTimeEndian>;

/// Gives the locations of a profile of this process the functions that they are in. Files that are not there any more, or are
/// others than those that were loaded, give none.
pub(super) fn resolve(profile: &mut Profile) {
    let mut functions: HashMap<Function, usize> =
        profile.functions.iter().cloned().enumerate().map(|(index, function)| (function, index)).collect();
    for index in 0..profile.mappings.len() {
        let opened = open(&profile.mappings[index]);
        let Ok(bytes) = opened else { continue };
        let is_unnamed = |location: &Location| location.mapping == Some(index) && location.lines.is_empty();
        let unnamed = profile.locations.iter().filter(|location| is_unnamed(location));
        let wanted = unnamed.map(|location| location.address).collect();
        let Ok(names) = Names::read(&bytes, &profile.mappings[index].build_id, wanted) else { continue };
        let mapping = &mut profile.mappings[index];
        // Also where none of its places has one: `go tool pprof` would ask for them again, at /debug/pprof/symbol.
        mapping.has_functions |= names.has_functions;
        for location in profile.locations.iter_mut().filter(|location| is_unnamed(location)) {
            for frame in names.frames(location.address) {
                mapping.has_filenames |= !frame.file.is_empty();
                mapping.has_line_numbers |= frame.line > 0;
                mapping.has_inline_frames |= !location.lines.is_empty();
                let function = Function {
                    name: demangled(frame.symbol),
                    system_name: frame.symbol.to_owned(),
                    file: frame.file.into_owned(),
                    start_line: 0,
                };
                let next = profile.functions.len();
                let function = *functions.entry(function).or_insert_with_key(|function| {
                    profile.functions.push(function.clone());
                    next
                });
                location.lines.push(Line { function, line: frame.line, column: 0 });
            }
        }
    }
}

/// The functions at addresses of the program, a line for each that is different, in the form of Go's `symbol`.
pub(super) fn at<'a>(addresses: impl Iterator<Item = &'a str>) -> String {
    let mut builder = Builder::new(Profile::default());
    let program = Objects::of_this_process().program_first(&mut builder);
    let parsed = addresses.filter_map(|text| u64::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok());
    let parsed: BTreeSet<u64> = parsed.collect();
    let parsed: Vec<(u64, usize)> =
        parsed.into_iter().map(|address| (address, builder.location(program, address))).collect();
    let mut profile = builder.finish();
    resolve(&mut profile);
    // The number says only that there are any.
    let mut text = "num_symbols: 1\n".to_owned();
    for (address, location) in parsed {
        if let Some(line) = profile.locations[location].lines.last() {
            text += &format!("{address:#x} {}\n", profile.functions[line.function].name);
        }
    }
    text
}

/// Whether the running program has a symbol table, without which its functions have no names.
pub(super) fn program_has_symbols() -> anyhow::Result<bool> {
    let file = Mapped::open("/proc/self/exe").context("/proc/self/exe")?;
    let elf = Elf::parse(&*file).context("/proc/self/exe")?;
    Ok(elf.symbols().next().is_some())
}

fn open(mapping: &Mapping) -> io::Result<Mapped> {
    let program = std::env::current_exe()?;
    let program = program.to_string_lossy();
    if program.strip_suffix(" (deleted)").unwrap_or(&program) == mapping.file {
        return Mapped::open("/proc/self/exe");
    }
    Mapped::open(&mapping.file)
}

/// A function at an address.
struct Frame<'a> {
    symbol: &'a str,
    file: Cow<'a, str>,
    line: i64,
}

/// The names of some addresses in one file.
struct Names<'a> {
    /// By address. Those of no function are not there.
    symbols: BTreeMap<u64, &'a str>,
    /// Whether the file names any function at all.
    has_functions: bool,
    lines: Option<addr2line::Context<Reader<'a>>>,
}

impl<'a> Names<'a> {
    fn read(bytes: &'a [u8], build_id: &str, addresses: Vec<u64>) -> anyhow::Result<Self> {
        let elf = Elf::parse(bytes)?;
        let id = elf.build_id()?.unwrap_or_default();
        let hexadecimal = id.iter().fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
        anyhow::ensure!(hexadecimal == build_id, "another file than the one that was loaded");
        let mut wanted = Wanted::new(addresses);
        if !wanted.look_through(elf.symbols()) {
            // Libraries of distributions have only what others link against.
            wanted.look_through(elf.dynamic_symbols());
        }
        Ok(Names { symbols: wanted.names(), has_functions: wanted.has_functions, lines: lines(&elf) })
    }

    /// The functions at an address, the innermost inlined one first.
    fn frames(&self, address: u64) -> Vec<Frame<'_>> {
        let mut frames = Vec::new();
        let symbol = self.symbols.get(&address).copied();
        if let Some(Ok(mut found)) = self.lines.as_ref().map(|lines| lines.find_frames(address).skip_all_loads()) {
            while let Ok(Some(frame)) = found.next() {
                let (file, line) = match frame.location {
                    Some(location) => (location.file.unwrap_or_default(), location.line.unwrap_or_default()),
                    None => ("", 0),
                };
                let name = frame.function.and_then(|function| function.name.to_string().ok());
                // With line tables alone only the symbol knows the name.
                if let Some(symbol) = name.or(symbol) {
                    frames.push(Frame { symbol, file: Cow::Borrowed(file), line: line.into() });
                }
            }
        }
        if frames.is_empty()
            && let Some(symbol) = symbol
        {
            frames.push(Frame { symbol, file: Cow::Borrowed(""), line: 0 });
        }
        frames
    }
}

type Symbol<'a, 'file> = ElfSymbol64<'a, 'file, object::Endianness>;

/// Addresses whose symbols are looked for, in one pass over the table: a program has tens of thousands of symbols, and a
/// profile a few hundred places, so that neither a sorted copy of the table nor the text of every name is worth its time.
struct Wanted<'a, 'file> {
    /// In their order.
    addresses: Vec<u64>,
    /// For each of them, of the symbols for which it is the first address that is not before them, the one that begins last.
    found: Vec<Option<Symbol<'a, 'file>>>,
    has_functions: bool,
}

impl<'a, 'file> Wanted<'a, 'file> {
    fn new(mut addresses: Vec<u64>) -> Self {
        addresses.sort_unstable();
        addresses.dedup();
        Wanted { found: vec![None; addresses.len()], addresses, has_functions: false }
    }

    /// Whether there are any functions among `symbols`.
    fn look_through(&mut self, symbols: impl Iterator<Item = Symbol<'a, 'file>>) -> bool {
        for symbol in symbols.filter(|symbol| symbol.kind() == SymbolKind::Text && symbol.is_definition()) {
            self.has_functions = true;
            let first = self.addresses.partition_point(|address| *address < symbol.address());
            if let Some(found) = self.found.get_mut(first)
                && found.is_none_or(|found| found.address() < symbol.address())
            {
                *found = Some(symbol);
            }
        }
        self.has_functions
    }

    /// Each address with the name of the last function that begins before it, if it reaches so far.
    fn names(&self) -> BTreeMap<u64, &'a str> {
        let mut last: Option<Symbol> = None;
        let mut named = BTreeMap::new();
        for (address, found) in self.addresses.iter().zip(&self.found) {
            last = found.or(last);
            let Some(symbol) = last else { continue };
            // Assembler code may have no sizes.
            let reaches = symbol.size() == 0 || *address - symbol.address() < symbol.size();
            if let (true, Ok(name)) = (reaches, symbol.name()) {
                named.insert(*address, name);
            }
        }
        named
    }
}

/// The debug information of a file, if it has any that is not compressed.
fn lines<'a>(elf: &Elf<'a>) -> Option<addr2line::Context<Reader<'a>>> {
    elf.section_by_name(".debug_line")?;
    let endian = if elf.is_little_endian() { RunTimeEndian::Little } else { RunTimeEndian::Big };
    let section = |id: gimli::SectionId| -> Result<Reader<'a>, gimli::Error> {
        let section = elf.section_by_name(id.name()).filter(|section| {
            section.compressed_file_range().is_ok_and(|range| range.format == object::CompressionFormat::None)
        });
        Ok(EndianSlice::new(section.and_then(|section| section.data().ok()).unwrap_or_default(), endian))
    };
    addr2line::Context::from_dwarf(gimli::Dwarf::load(section).ok()?).ok()
}

/// As people know it, without the hash that tells generic instances apart.
fn demangled(symbol: &str) -> String {
    match rustc_demangle::try_demangle(symbol) {
        Ok(name) => format!("{name:#}"),
        Err(_) => symbol.to_owned(),
    }
}

/// A file in memory for as long as this lives, page by page as it is read.
struct Mapped {
    address: *mut c_void,
    length: usize,
}

impl Mapped {
    fn open(path: &str) -> io::Result<Self> {
        let file = File::open(path)?;
        let length = file.metadata()?.len() as usize;
        if length == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        // SAFETY: a private mapping wherever the kernel likes, of a file that is open.
        let address =
            unsafe { libc::mmap(ptr::null_mut(), length, libc::PROT_READ, libc::MAP_PRIVATE, file.as_raw_fd(), 0) };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        Ok(Mapped { address, length })
    }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: that many bytes are mapped until the drop. Nobody writes into files of code that are loaded: programs and
        // libraries are replaced, and what is replaced stays as it was.
        unsafe { std::slice::from_raw_parts(self.address.cast(), self.length) }
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: what was mapped in `open`.
        unsafe { libc::munmap(self.address, self.length) };
    }
}

#[cfg(test)]
mod tests {
    use super::super::objects::Objects;
    use super::super::pprof::{Builder, Profile};
    use super::*;

    #[inline(never)]
    fn a_function_of_this_test() -> usize {
        std::hint::black_box(7)
    }

    /// The names of what is at these addresses of this process.
    fn names(addresses: &[usize]) -> (Profile, Vec<String>) {
        let objects = Objects::of_this_process();
        let mut builder = Builder::new(Profile::default());
        objects.program_first(&mut builder);
        let places: Vec<usize> = addresses.iter().map(|address| objects.location(&mut builder, *address)).collect();
        let mut profile = builder.finish();
        resolve(&mut profile);
        let name = |place: &usize| match profile.locations[*place].lines.last() {
            Some(line) => profile.functions[line.function].name.clone(),
            None => "?".to_owned(),
        };
        let names = places.iter().map(name).collect();
        (profile, names)
    }

    #[test]
    fn functions_of_program_and_libraries_have_names() {
        let addresses = [a_function_of_this_test as *const () as usize, libc::getenv as *const () as usize, 0x10];
        let (profile, names) = names(&addresses);
        assert!(names[0].ends_with("a_function_of_this_test"), "{names:?}");
        assert!(names[1].contains("getenv"), "{names:?}");
        assert_eq!(names[2], "?");
        assert!(
            profile.mappings[0].has_functions && !profile.mappings[0].build_id.is_empty(),
            "{:?}",
            profile.mappings
        );
        assert!(profile.mappings[0].file.starts_with('/'), "{:?}", profile.mappings);
    }

    #[test]
    fn a_file_that_was_read_is_not_to_be_read_again() {
        let objects = Objects::of_this_process();
        let mut builder = Builder::new(Profile::default());
        objects.location(&mut builder, libc::getenv as *const () as usize);
        let mut profile = builder.finish();
        // The very beginning of the library's code is in no function.
        profile.locations[0].address = profile.mappings[0].start;
        resolve(&mut profile);
        assert!(profile.locations[0].lines.is_empty(), "{profile:?}");
        assert!(profile.mappings[0].has_functions);
    }

    #[test]
    fn another_file_at_the_same_path_gives_no_names() {
        let address = libc::getenv as *const () as usize;
        let objects = Objects::of_this_process();
        let mut builder = Builder::new(Profile::default());
        objects.location(&mut builder, address);
        let mut profile = builder.finish();
        profile.mappings[0].build_id = "00".to_owned();
        resolve(&mut profile);
        assert!(profile.locations[0].lines.is_empty());
    }
}
