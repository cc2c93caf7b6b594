// What this processor can do, as far as a kernel may ask for it.
#pragma once

#include <cstddef>

namespace kvfold {

struct Feature {
    const char* name;  // as /proc/cpuinfo and the compiler spell it, with a '-' between words
    bool (*here)();    // the processor has it and the operating system lets us use it
};

// All features that are known on this architecture; `count` of them.
const Feature* features(size_t* count);

// Whether a feature is here; an unknown name is not.
bool has_feature(const char* name);

}  // namespace kvfold
