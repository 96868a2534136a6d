//! The files that this process's code came from, and where in them an address is.

use std::path::Path;

use mappings::MAPPINGS;

use super::pprof::{Builder, Mapping};

/// The loaded files of this process. Those that were loaded after the first profile are unknown.
pub(super) struct Objects {
    segments: Vec<Segment>,
}

struct Segment {
    start: usize,
    end: usize,
    mapping: Mapping,
}

impl Objects {
    pub fn of_this_process() -> Self {
        let all = MAPPINGS.as_deref().unwrap_or_default();
        let program = all.first().map(|first| first.pathname.as_path());
        let segments = all.iter().map(|segment| Segment {
            start: segment.memory_start,
            end: segment.memory_end,
            // As the linker placed it, and not where this process happens to have it: so that profiles of two
            // processes agree, and tell nobody the layout of this one's memory.
            mapping: Mapping {
                start: segment.memory_offset as u64,
                limit: (segment.memory_offset + (segment.memory_end - segment.memory_start)) as u64,
                offset: segment.file_offset,
                file: path_of(&segment.pathname, program),
                build_id: segment.build_id.as_ref().map(ToString::to_string).unwrap_or_default(),
                ..Mapping::default()
            },
        });
        Objects { segments: segments.collect() }
    }

    /// The index of the location that an address of this process belongs to.
    pub fn location(&self, builder: &mut Builder, address: usize) -> usize {
        match self.segments.iter().find(|segment| (segment.start..segment.end).contains(&address)) {
            Some(Segment { start, mapping, .. }) => {
                let index = builder.mapping(mapping);
                builder.location(Some(index), mapping.start + (address - start) as u64)
            }
            None => builder.location(None, address as u64),
        }
    }

    /// Names the program's own code first, as readers expect, and gives its index.
    pub fn program_first(&self, builder: &mut Builder) -> Option<usize> {
        let here = Objects::of_this_process as *const () as usize;
        let program = self.segments.iter().find(|segment| (segment.start..segment.end).contains(&here));
        program.map(|segment| builder.mapping(&segment.mapping))
    }
}

/// The absolute path of a loaded file; the program's own as the kernel knows it, since it may have been started by a
/// relative one.
fn path_of(path: &Path, program: Option<&Path>) -> String {
    let absolute = if Some(path) == program { std::env::current_exe().ok() } else { None };
    let path = absolute.as_deref().unwrap_or(path).to_string_lossy();
    path.strip_suffix(" (deleted)").unwrap_or(&path).to_owned()
}
