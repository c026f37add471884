/* Pixels of a batch from the decoded cache to normalised floats, in one pass.
 *
 * What augment.py also does with NumPy, to the same bits: flip, crop, normalise, erase.
 * One pass instead of three, and one call for many images, so that threads do not wait for each
 * other between images. Needs no Python: it is loaded with ctypes, and optional.
 */

#include <stddef.h>
#include <stdint.h>

enum { CHANNELS = 3, PIECE = 256 };

/* One drawn image; `present`, then the fields of Drawn in augment.py. */
struct drawn {
    int64_t present, flip, down, right, top, left, tall, wide;
};

#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__gnu_linux__)
#define FOR_THIS_CPU __attribute__((target_clones("avx2", "default")))
#else
#define FOR_THIS_CPU
#endif

/* Two roundings, as on a GPU: nothing here may be fused into one. */
FOR_THIS_CPU static void normalise(float *restrict out, const uint8_t *restrict in, size_t n,
                                   float shift, float scale)
{
    for (size_t i = 0; i < n; i++)
        out[i] = ((float)in[i] - shift) * scale;
}

static void fill(float *out, size_t n, float value)
{
    for (size_t i = 0; i < n; i++)
        out[i] = value;
}

/* The pixels before `end`, from right to left, a piece at a time. */
static void normalise_mirrored(float *out, const uint8_t *end, size_t pixels, float shift,
                               float scale)
{
    uint8_t piece[PIECE * CHANNELS];
    while (pixels) {
        size_t n = pixels < PIECE ? pixels : PIECE;
        for (size_t x = 0; x < n; x++) {
            end -= CHANNELS;
            piece[CHANNELS * x] = end[0];
            piece[CHANNELS * x + 1] = end[1];
            piece[CHANNELS * x + 2] = end[2];
        }
        normalise(out, piece, n * CHANNELS, shift, scale);
        out += n * CHANNELS;
        pixels -= n;
    }
}

static int64_t clamp(int64_t value, int64_t low, int64_t high)
{
    return value < low ? low : value > high ? high : value;
}

static void image(float *out, const uint8_t *in, const struct drawn *d, int64_t height,
                  int64_t width, float shift, float scale)
{
    const size_t line = (size_t)width * CHANNELS;
    const float black = (0.0f - shift) * scale;
    const int64_t left = clamp(-d->right, 0, width);
    const int64_t end = clamp(width - d->right, left, width);
    const int64_t erased = clamp(d->left, 0, width);
    const int64_t erased_end = clamp(d->left + d->wide, erased, width);
    for (int64_t y = 0; y < height; y++, out += line) {
        const int64_t from = y + d->down;
        if (from < 0 || from >= height) {
            fill(out, line, black);
        } else {
            const uint8_t *pixels = in + (size_t)from * line;
            float *inside = out + left * CHANNELS;
            fill(out, (size_t)left * CHANNELS, black);
            if (d->flip)
                normalise_mirrored(inside, pixels + (width - left - d->right) * CHANNELS,
                                   (size_t)(end - left), shift, scale);
            else
                normalise(inside, pixels + (left + d->right) * CHANNELS,
                          (size_t)(end - left) * CHANNELS, shift, scale);
            fill(out + end * CHANNELS, (size_t)(width - end) * CHANNELS, black);
        }
        if (y >= d->top && y < d->top + d->tall)
            fill(out + erased * CHANNELS, (size_t)(erased_end - erased) * CHANNELS, 0.0f);
    }
}

/* images[n] of [height, width, 3], drawn[n], outs[n] of [height, width, 3]. */
void compose(const uint8_t *const *images, const struct drawn *drawn, float *const *outs, int64_t n,
             int64_t height, int64_t width, float shift, float scale)
{
    for (int64_t i = 0; i < n; i++) {
        if (drawn[i].present)
            image(outs[i], images[i], &drawn[i], height, width, shift, scale);
        else
            fill(outs[i], (size_t)height * (size_t)width * CHANNELS, 0.0f);
    }
}
