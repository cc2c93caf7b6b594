// Which builds of the kernel there are, and what each asks of the processor. A new build is a line here, a declaration
// in attend_pages.hpp and a kvfold_variant() in CMakeLists.txt.
#include "variants.hpp"

#include "attend_pages.hpp"
#include "cpu_features.hpp"

namespace kvfold {
namespace {

using Names = std::vector<const char*>;

struct Build {
    const Variant& variant;
    Names needs;
};

#ifdef KVFOLD_X86
Names join(Names first, const Names& second) {
    first.insert(first.end(), second.begin(), second.end());
    return first;
}

const Names kAvx512 = {"avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni"};
#endif

// Best first.
const std::vector<Build>& builds() {
    static const std::vector<Build> all = {
#ifdef KVFOLD_X86
        {amx::variant, join(kAvx512, {"amx-tile", "amx-int8"})},
        {avx512::variant, kAvx512},
        {avx2::variant, {"avx2", "fma"}},
#endif
        {baseline::variant, {}},
    };
    return all;
}

std::string missing(const Build& build) {
    std::string names;
    for (const char* need : build.needs) {
        if (!has_feature(need)) names += (names.empty() ? "" : ", ") + std::string(need);
    }
    return names;
}

}  // namespace

const Variant* const* variants(size_t* count) {
    static const std::vector<const Variant*> usable = [] {
        std::vector<const Variant*> found;
        for (const Build& build : builds()) {
            if (missing(build).empty()) found.push_back(&build.variant);
        }
        return found;
    }();
    *count = usable.size();
    return usable.data();
}

std::vector<Verdict> verdicts() {
    std::vector<Verdict> all;
    for (const Build& build : builds()) all.push_back({build.variant.name, missing(build)});
    return all;
}

}  // namespace kvfold
