// The part of the module that moves rows into pages, out of them and between them.
#pragma once

#include <nanobind/nanobind.h>

void bind_store(nanobind::module_& m);
