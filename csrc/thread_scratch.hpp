// Scratch of one thread, aligned to 64 bytes. It lives as long as the thread, because allocating it anew costs page faults
// on every call; no task asks for a second one while it uses the first.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace kvfold {

struct AlignedDelete {
    void operator()(void* p) const { ::operator delete[](p, std::align_val_t{64}); }
};

// At least `bytes`, with anything in them; null if there is no memory.
inline void* thread_scratch(size_t bytes) {
    thread_local std::unique_ptr<void, AlignedDelete> memory;
    thread_local size_t size = 0;
    if (size < bytes) {
        memory.reset();
        size = 0;
        memory.reset(::operator new[](bytes, std::align_val_t{64}, std::nothrow));
        if (memory) size = bytes;
    }
    return memory.get();
}

}  // namespace kvfold
