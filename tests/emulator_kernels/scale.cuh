// A header that right.cu includes.
#pragma once

#ifndef SCALE
#define SCALE 2
#endif
