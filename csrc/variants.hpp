// The builds of the kernel and what this processor lacks for them. (The kernel's own header stays free of the standard
// library's templates: see vectors.hpp.)
#pragma once

#include <string>
#include <vector>

namespace kvfold {

struct Verdict {
    std::string build;
    std::string missing;  // features, or nothing: it can run here
};

// One for each build, best first.
std::vector<Verdict> verdicts();

}  // namespace kvfold
