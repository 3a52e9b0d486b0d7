//! The claims policy: what every token of a keyset must and must not say, applied to every signature.
//!
//! The caller's claims are copied into the payload in one pass, text by text: numbers keep every digit, strings every
//! byte; only white space between them goes. What the daemon vouches for (`iss`, `iat`, `nbf`, `exp`, `jti`) it writes
//! itself. A request names no algorithm and no header but `typ`, and that only from the keyset's list.
//!
//! Limits: a payload of [`MAX_PAYLOAD_BYTES`], [`MAX_MEMBERS`] in all objects together, [`MAX_DEPTH`] levels,
//! [`MAX_AUDIENCES`], a `jti` of [`MAX_JTI_CHARS`]. Numbers of any precision pass, but not those that no double can
//! hold (`1e999`): verifiers would read infinity or fail.

mod json;
#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use self::json::{Cursor, Json, Kind};
use super::policy::TokenPolicy;
use super::time::{Span, Timestamp};

/// The longest payload in bytes, the daemon's claims included; its token is a third longer.
pub const MAX_PAYLOAD_BYTES: usize = 16 * 1024;
/// The most members that all objects in `claims` may have together.
pub const MAX_MEMBERS: usize = 256;
/// How deep `claims` may nest; `claims` itself is the first level.
pub const MAX_DEPTH: usize = 32;
/// The most entries that `aud` may have.
pub const MAX_AUDIENCES: usize = 64;
/// The longest `jti` a caller may give, in characters.
pub const MAX_JTI_CHARS: usize = 128;

/// What a caller asks to be signed: the body of a sign request, its grammar checked but not yet its claims.
pub struct SignRequest<'a> {
    claims: Json<'a>,
    ttl: Option<Ttl<'a>>,
    typ: Option<Cow<'a, str>>,
}

#[derive(Clone, Copy)]
struct Ttl<'a> {
    secs: i64,
    written: &'a str,
}

/// A [`TokenPolicy`] made ready to be applied many times.
pub struct TokenRules {
    /// `{"iss":"…"`, the beginning of every payload.
    opening: Vec<u8>,
    max_ttl: i64,
    default_ttl: i64,
    backdate: Span,
    required: Vec<String>,
    /// Folded, see [`fold`].
    forbidden: Vec<String>,
    audiences: HashSet<String>,
    types: Vec<TokenType>,
}

struct TokenType {
    name: String,
    /// RFC 9068's `at+jwt`.
    is_access_token: bool,
}

/// A payload ready to be signed.
pub struct Prepared {
    /// The claims as JSON.
    pub payload: Vec<u8>,
    /// Which of [`TokenRules::types`] the header shall carry.
    pub typ: usize,
    pub jti: String,
    /// `iat`, in seconds since 1970.
    pub issued_at: i64,
    /// `exp`, in seconds since 1970.
    pub expires_at: i64,
    /// Seconds from now until `exp`; at most `max_ttl`.
    pub expires_in: i64,
}

/// Why a request is not signed. Names claims, never their values, other than those of `aud`, `typ` and `ttl`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ClaimError {
    #[error("the request cannot be read: {detail}")]
    Malformed { detail: String },
    #[error("ttl {ttl} is not a life for a token: write a duration like \"10m\" or 600, in whole seconds from 1")]
    TtlInvalid { ttl: Quoted },
    #[error("ttl {ttl} is longer than this keyset's max_ttl: ask for {max} or less")]
    TtlTooLong { ttl: Quoted, max: Span },
    #[error("claims.exp is further away than this keyset's max_ttl: give a time at most {max} from now, or ttl")]
    ExpTooFar { max: Span },
    #[error("ttl and claims.exp both say when the token expires: give one of them")]
    TtlAndExp,
    #[error("{path} is missing or empty: {demand}")]
    Missing { path: String, demand: Demand },
    #[error("{path} is forbidden in tokens of this keyset")]
    Forbidden { path: String },
    #[error("{path} is set by jwksd: leave it out")]
    SetByDaemon { path: String },
    #[error("{path} {problem}")]
    Invalid { path: String, problem: Problem },
    #[error("claims.aud: {audience} is not an audience that {whose} may name")]
    AudienceNotAllowed { audience: Quoted, whose: Whose },
    #[error("typ {typ} is not a type of this keyset's tokens: use {allowed}")]
    TypeNotAllowed { typ: Quoted, allowed: String },
}

/// Who demands a claim that is missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Demand {
    #[error("this keyset requires it")]
    Keyset,
    #[error("RFC 9068 §2.2 requires it of a token of the type at+jwt")]
    AccessToken,
    #[error("the audiences of {0} are limited, so its tokens must name one")]
    Audiences(Whose),
}

/// Whose list of audiences applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Whose {
    #[error("this keyset")]
    Keyset,
    #[error("this client")]
    Client,
}

/// What is wrong with a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    #[error("must be a string")]
    NotString,
    #[error("must be a number of seconds since 1970 (NumericDate)")]
    NotNumber,
    #[error("must be an array of strings")]
    NotStrings,
    #[error("must be a whole number of seconds since 1970 (NumericDate)")]
    NotWholeSeconds,
    #[error("must be a string or an array of strings, at least one and none of them empty")]
    NotAudience,
    #[error("names an audience twice")]
    RepeatedAudience,
    #[error("names more than {MAX_AUDIENCES} audiences")]
    TooManyAudiences,
    #[error("must be a string of 1 to {MAX_JTI_CHARS} characters")]
    NotTokenId,
    #[error("must be in the future")]
    NotInFuture,
    #[error("must be before exp")]
    NotBeforeExp,
    #[error("stands there twice")]
    Duplicate,
    #[error("differs from the registered claim `{0}` in case only, and some verifiers do not tell case: write `{0}`")]
    Lookalike(&'static str),
    #[error("holds half of a surrogate pair, which is not Unicode text")]
    NotUnicode,
    #[error("is a number beyond what verifiers can read (about 1.8e308)")]
    NumberTooLarge,
    #[error("is nested deeper than {MAX_DEPTH} levels")]
    TooDeep,
    #[error("is one member more than the {MAX_MEMBERS} that claims may have")]
    TooManyMembers,
    #[error("are too many: the payload would be longer than {MAX_PAYLOAD_BYTES} bytes")]
    TooLarge,
    #[error("are too long for this keyset's backend, which signs at most {longest} bytes with this algorithm")]
    TooLongForBackend { longest: usize },
}

/// The reasons by which refused requests are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Rejection {
    Ttl,
    Claims,
    Audience,
    Malformed,
}

/// The problem types that refused requests are answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ClaimProblem {
    /// Answered with 400; all others with 422.
    MalformedRequest,
    TtlInvalid,
    TtlTooLong,
    ClaimMissing,
    ClaimForbidden,
    ClaimInvalid,
    AudienceNotAllowed,
    TypeNotAllowed,
}

/// A caller's text as an error message may show it: in quotes, control characters escaped, long ones cut.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quoted(String);

/// Reads the body of a sign request: `{"claims": {…}, "ttl": "10m" | 600, "typ": "at+jwt"}`. `claims` must be there;
/// a member that is not needed is left out, not null.
///
/// Fails with [`ClaimError::Malformed`] for anything but JSON, unknown or repeated members and members of the wrong
/// type, and with [`ClaimError::TtlInvalid`] for a `ttl` that is no positive number of whole seconds. `claims` are
/// judged by [`TokenRules::issue`].
pub fn parse_request(body: &[u8]) -> Result<SignRequest<'_>, ClaimError> {
    let json = Json::parse(body).map_err(|error| not_json(&error))?;
    if json.kind() != Kind::Object {
        return Err(malformed("it must be a JSON object with the member `claims`"));
    }
    let (mut claims, mut ttl, mut typ) = (None, None, None);
    let mut cursor = json.walk();
    cursor.enter();
    while cursor.next_item() {
        let name = cursor.name();
        let value = cursor.value();
        let repeated = match name.string().as_deref() {
            Some("claims") => claims.replace(value).is_some(),
            Some("ttl") => ttl.replace(value).is_some(),
            Some("typ") => typ.replace(value).is_some(),
            _ => {
                let name = Quoted::raw(name.text());
                return Err(malformed(&format!("the member {name} is unknown: there are `claims`, `ttl` and `typ`")));
            }
        };
        if repeated {
            return Err(malformed(&format!("the member {} stands there twice", Quoted::raw(name.text()))));
        }
    }
    let claims = claims.ok_or_else(|| malformed("the member `claims` is missing"))?;
    if claims.kind() != Kind::Object {
        return Err(malformed("the member `claims` must be an object"));
    }
    Ok(SignRequest { claims, ttl: ttl.map(parse_ttl).transpose()?, typ: typ.map(parse_typ).transpose()? })
}

impl TokenRules {
    /// Rules for the tokens of one keyset. `issuer_url` becomes `iss` as it stands. A policy without types makes
    /// tokens of the type `JWT`.
    pub fn new(issuer_url: &str, policy: &TokenPolicy) -> Self {
        let mut opening = br#"{"iss":"#.to_vec();
        push_string(&mut opening, issuer_url);
        let mut types: Vec<TokenType> = policy.types.iter().map(|name| TokenType::new(name)).collect();
        if types.is_empty() {
            types.push(TokenType::new("JWT"));
        }
        let daemons_own = |claim: &String| matches!(claim.as_str(), "iss" | "iat" | "nbf" | "exp" | "jti");
        TokenRules {
            opening,
            max_ttl: policy.max_ttl.as_secs(),
            default_ttl: policy.default_ttl.min(policy.max_ttl).as_secs(),
            backdate: policy.backdate,
            required: policy.required_claims.iter().filter(|claim| !daemons_own(claim)).cloned().collect(),
            forbidden: policy.forbidden_claims.iter().map(|name| fold(name)).collect(),
            audiences: policy.audiences.iter().cloned().collect(),
            types,
        }
    }

    /// The `typ` headers these rules may give a token, as configured; the first is the default.
    pub fn types(&self) -> impl ExactSizeIterator<Item = &str> {
        self.types.iter().map(|typ| typ.name.as_str())
    }

    /// The payload of a token issued at `now`, with `jti` as its ID unless the caller gave one. `client_audiences`
    /// are the only ones the caller may name, on top of the keyset's own list; `None`: any.
    ///
    /// Whatever is asked for, `exp ≤ now + max_ttl`. Fails with any [`ClaimError`] but `Malformed` and `TtlInvalid`.
    pub fn issue(
        &self,
        request: &SignRequest<'_>,
        now: Timestamp,
        jti: &str,
        client_audiences: Option<&[String]>,
    ) -> Result<Prepared, ClaimError> {
        let typ = self.choose_type(request.typ.as_deref())?;
        let given = Copying::new(self, request.claims).run().map_err(|error| error.within("claims"))?;
        let access_token = self.types.get(typ).is_some_and(|typ| typ.is_access_token);
        self.check_required(&given, access_token)?;
        check_types(&given)?;
        let audiences = given.aud.map(parse_audiences).transpose()?;
        self.check_audience(audiences.as_deref(), client_audiences)?;
        let times = self.times(request.ttl, &given, now)?;
        let own_jti = given.jti.map(parse_jti).transpose()?;
        let jti = own_jti.unwrap_or(Cow::Borrowed(jti)).into_owned();
        let payload = finish(given.payload, &times, &jti)?;
        Ok(Prepared {
            payload,
            typ,
            jti,
            issued_at: times.iat,
            expires_at: times.exp,
            expires_in: times.exp.saturating_sub(now.as_secs()),
        })
    }

    /// Media types are compared without case (RFC 7515 §4.1.9).
    fn choose_type(&self, asked: Option<&str>) -> Result<usize, ClaimError> {
        let Some(asked) = asked else { return Ok(0) };
        let same = |typ: &TokenType| subtype(&typ.name).eq_ignore_ascii_case(subtype(asked));
        self.types.iter().position(same).ok_or_else(|| ClaimError::TypeNotAllowed {
            typ: Quoted::new(asked),
            allowed: self.types().collect::<Vec<_>>().join(" or "),
        })
    }

    fn check_required(&self, given: &Given<'_>, access_token: bool) -> Result<(), ClaimError> {
        let rfc_9068: &[&str] = if access_token { &["sub", "aud", "client_id"] } else { &[] };
        let by_type = rfc_9068.iter().map(|claim| (*claim, Demand::AccessToken));
        let by_policy = self.required.iter().map(|claim| (claim.as_str(), Demand::Keyset));
        match by_type.chain(by_policy).find(|(claim, _)| !given.has(claim)) {
            Some((claim, demand)) => Err(ClaimError::Missing { path: format!("claims.{}", PathName(claim)), demand }),
            None => Ok(()),
        }
    }

    /// A token without an audience is good for every careless verifier, so a list of audiences demands one.
    fn check_audience(&self, named: Option<&[Cow<'_, str>]>, client: Option<&[String]>) -> Result<(), ClaimError> {
        let Some(named) = named else {
            let whose = if self.audiences.is_empty() { client.map(|_| Whose::Client) } else { Some(Whose::Keyset) };
            let missing =
                |whose| ClaimError::Missing { path: "claims.aud".to_owned(), demand: Demand::Audiences(whose) };
            return whose.map_or(Ok(()), |whose| Err(missing(whose)));
        };
        for audience in named {
            let refused = |whose| ClaimError::AudienceNotAllowed { audience: Quoted::new(audience), whose };
            if !self.audiences.is_empty() && !self.audiences.contains(&**audience) {
                return Err(refused(Whose::Keyset));
            }
            if client.is_some_and(|list| !list.iter().any(|allowed| allowed == audience)) {
                return Err(refused(Whose::Client));
            }
        }
        Ok(())
    }

    /// NumericDates, all rounded down. A caller's `nbf` stands as given: `backdate` moves only what the daemon sets.
    fn times(&self, ttl: Option<Ttl<'_>>, given: &Given<'_>, now: Timestamp) -> Result<Times, ClaimError> {
        let max = Span::from_secs(self.max_ttl);
        let latest = (now + max).as_secs();
        let exp = match (ttl, given.exp) {
            (Some(_), Some(_)) => return Err(ClaimError::TtlAndExp),
            (Some(ttl), None) if ttl.secs > self.max_ttl => {
                return Err(ClaimError::TtlTooLong { ttl: Quoted::brief(ttl.written), max });
            }
            (Some(ttl), None) => now.as_secs().saturating_add(ttl.secs),
            (None, None) => now.as_secs().saturating_add(self.default_ttl),
            (None, Some(exp)) => match whole_seconds("claims.exp", exp)? {
                exp if exp <= now.as_secs() => return Err(invalid("claims.exp", Problem::NotInFuture)),
                exp if exp > latest => return Err(ClaimError::ExpTooFar { max }),
                exp => exp,
            },
        };
        let iat = (now - self.backdate).as_secs();
        let nbf = given.nbf.map_or(Ok(iat), |nbf| whole_seconds("claims.nbf", nbf))?;
        if nbf >= exp {
            return Err(invalid("claims.nbf", Problem::NotBeforeExp));
        }
        Ok(Times { iat, nbf, exp })
    }
}

impl ClaimError {
    /// The reason to count it by.
    pub const fn rejection(&self) -> Rejection {
        match self {
            ClaimError::Malformed { .. } => Rejection::Malformed,
            ClaimError::TtlInvalid { .. }
            | ClaimError::TtlTooLong { .. }
            | ClaimError::ExpTooFar { .. }
            | ClaimError::TtlAndExp => Rejection::Ttl,
            ClaimError::AudienceNotAllowed { .. } => Rejection::Audience,
            ClaimError::Missing { .. }
            | ClaimError::Forbidden { .. }
            | ClaimError::SetByDaemon { .. }
            | ClaimError::Invalid { .. }
            | ClaimError::TypeNotAllowed { .. } => Rejection::Claims,
        }
    }

    /// The problem type to answer with.
    pub const fn problem(&self) -> ClaimProblem {
        match self {
            ClaimError::Malformed { .. } => ClaimProblem::MalformedRequest,
            ClaimError::TtlTooLong { .. } | ClaimError::ExpTooFar { .. } => ClaimProblem::TtlTooLong,
            ClaimError::TtlInvalid { .. } => ClaimProblem::TtlInvalid,
            ClaimError::TtlAndExp | ClaimError::Invalid { .. } => ClaimProblem::ClaimInvalid,
            ClaimError::Missing { .. } => ClaimProblem::ClaimMissing,
            ClaimError::Forbidden { .. } | ClaimError::SetByDaemon { .. } => ClaimProblem::ClaimForbidden,
            ClaimError::AudienceNotAllowed { .. } => ClaimProblem::AudienceNotAllowed,
            ClaimError::TypeNotAllowed { .. } => ClaimProblem::TypeNotAllowed,
        }
    }

    /// Puts a step before the path of the claim that is at fault. Paths are built on the way out, so that only
    /// refused requests pay for them.
    fn within(mut self, step: impl fmt::Display) -> Self {
        match &mut self {
            ClaimError::Missing { path, .. }
            | ClaimError::Forbidden { path }
            | ClaimError::SetByDaemon { path }
            | ClaimError::Invalid { path, .. } => path.insert_str(0, &step.to_string()),
            ClaimError::Malformed { .. }
            | ClaimError::TtlInvalid { .. }
            | ClaimError::TtlTooLong { .. }
            | ClaimError::ExpTooFar { .. }
            | ClaimError::TtlAndExp
            | ClaimError::AudienceNotAllowed { .. }
            | ClaimError::TypeNotAllowed { .. } => {}
        }
        self
    }
}

impl Rejection {
    pub const ALL: [Rejection; 4] = [Rejection::Ttl, Rejection::Claims, Rejection::Audience, Rejection::Malformed];

    /// The value of the label `reason`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Rejection::Ttl => "ttl",
            Rejection::Claims => "claims",
            Rejection::Audience => "audience",
            Rejection::Malformed => "malformed",
        }
    }
}

impl ClaimProblem {
    /// What follows `urn:jwksd:problem:`.
    pub const fn slug(self) -> &'static str {
        match self {
            ClaimProblem::MalformedRequest => "malformed-request",
            ClaimProblem::TtlInvalid => "ttl-invalid",
            ClaimProblem::TtlTooLong => "ttl-too-long",
            ClaimProblem::ClaimMissing => "claim-missing",
            ClaimProblem::ClaimForbidden => "claim-forbidden",
            ClaimProblem::ClaimInvalid => "claim-invalid",
            ClaimProblem::AudienceNotAllowed => "audience-not-allowed",
            ClaimProblem::TypeNotAllowed => "type-not-allowed",
        }
    }
}

impl TokenType {
    fn new(name: &str) -> Self {
        TokenType { name: name.to_owned(), is_access_token: subtype(name).eq_ignore_ascii_case("at+jwt") }
    }
}

impl Quoted {
    const SHOWN: usize = 80;

    fn new(text: &str) -> Self {
        Quoted(format!("`{}`", Self::shorten(text)))
    }

    /// Of a JSON text, which has its quotes, if any, already.
    fn raw(text: &str) -> Self {
        Quoted(Self::shorten(text))
    }

    /// Of what should be a duration: nothing long is one, and a caller's mistake may have put a secret here.
    fn brief(text: &str) -> Self {
        const LONGEST: usize = 32;
        match text.char_indices().nth(LONGEST) {
            None => Self::raw(text),
            Some(_) => Quoted(format!("of {} bytes", text.len())),
        }
    }

    fn shorten(text: &str) -> String {
        let mut shown: String = text.chars().take(Self::SHOWN).flat_map(escape_invisible).collect();
        if text.chars().nth(Self::SHOWN).is_some() {
            shown.push('…');
        }
        shown
    }
}

impl fmt::Display for Quoted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Claims may hold anything, so they are not shown.
impl fmt::Debug for SignRequest<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ttl = self.ttl.map(|ttl| ttl.secs);
        f.debug_struct("SignRequest").field("ttl", &ttl).field("typ", &self.typ).finish_non_exhaustive()
    }
}

/// As [`SignRequest`].
impl fmt::Debug for Prepared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Prepared")
            .field("typ", &self.typ)
            .field("jti", &self.jti)
            .field("issued_at", &self.issued_at)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// The registered claims of RFC 7519 §4.1.
const REGISTERED: [&str; 7] = ["iss", "sub", "aud", "exp", "nbf", "iat", "jti"];

/// The caller's claims on their way into the payload, in one pass over their text.
struct Copying<'r, 'a> {
    rules: &'r TokenRules,
    cursor: Cursor<'a>,
    payload: Vec<u8>,
    /// The members so far of every object around the cursor, outermost first: `claims`' own remain at the end.
    seen: Vec<Member<'a>>,
    members: usize,
}

struct Member<'a> {
    name: Cow<'a, str>,
    shape: Shape,
}

/// What the checks need to know of a value.
#[derive(Clone, Copy)]
struct Shape {
    kind: Kind,
    /// `null`, a blank string, an object without members, an array without elements that are not empty.
    empty: bool,
    /// An array of strings.
    strings: bool,
}

/// The caller's claims: copied, but for those that are the daemon's to write.
struct Given<'a> {
    payload: Vec<u8>,
    members: Vec<Member<'a>>,
    aud: Option<Json<'a>>,
    exp: Option<Json<'a>>,
    nbf: Option<Json<'a>>,
    jti: Option<Json<'a>>,
}

/// In seconds since 1970.
struct Times {
    iat: i64,
    nbf: i64,
    exp: i64,
}

impl<'r, 'a> Copying<'r, 'a> {
    fn new(rules: &'r TokenRules, claims: Json<'a>) -> Self {
        /// Room for `,"iat":…,"nbf":…,"exp":…,"jti":"…"}` with a UUID.
        const CLOSING: usize = 110;
        let mut payload = Vec::with_capacity(rules.opening.len() + claims.text().len() + CLOSING);
        payload.extend_from_slice(&rules.opening);
        Copying { rules, cursor: claims.walk(), payload, seen: Vec::with_capacity(16), members: 0 }
    }

    fn run(mut self) -> Result<Given<'a>, ClaimError> {
        let (mut aud, mut exp, mut nbf, mut jti) = (None, None, None, None);
        self.cursor.enter();
        while let Some((written, name)) = self.name(0)? {
            refuse_daemons_own(&name)?;
            let (mark, before) = (self.cursor.mark(), self.payload.len());
            self.payload.push(b',');
            self.payload.extend_from_slice(written.text().as_bytes());
            self.payload.push(b':');
            let shape = self.value(1).map_err(|error| error.within(Step::Member(&name)))?;
            let value = self.cursor.since(mark);
            let written_later = match &*name {
                "exp" => exp.replace(value).is_none(),
                "nbf" => nbf.replace(value).is_none(),
                "jti" => jti.replace(value).is_none(),
                "aud" => aud.replace(value).is_some(),
                _ => false,
            };
            if written_later {
                self.payload.truncate(before);
            }
            self.seen.push(Member { name, shape });
        }
        Ok(Given { payload: self.payload, members: self.seen, aud, exp, nbf, jti })
    }

    /// The name of the next member of the object whose members stand in `seen` from `first`, as written and as read.
    fn name(&mut self, first: usize) -> Result<Option<(Json<'a>, Cow<'a, str>)>, ClaimError> {
        if !self.cursor.next_item() {
            return Ok(None);
        }
        let written = self.cursor.name();
        let Some(name) = written.string() else {
            return Err(invalid(&Step::Member(written.text()).to_string(), Problem::NotUnicode));
        };
        self.members += 1;
        let problem = if self.members > MAX_MEMBERS {
            Problem::TooManyMembers
        } else if self.seen[first..].iter().any(|member| member.name == name) {
            Problem::Duplicate
        } else if self.rules.forbidden.iter().any(|forbidden| folds_to(&name, forbidden)) {
            return Err(ClaimError::Forbidden { path: Step::Member(&name).to_string() });
        } else {
            return Ok(Some((written, name)));
        };
        Err(invalid(&Step::Member(&name).to_string(), problem))
    }

    /// Copies the value at the cursor, which stands inside `depth` levels.
    fn value(&mut self, depth: usize) -> Result<Shape, ClaimError> {
        let kind = self.cursor.kind();
        match kind {
            Kind::Object | Kind::Array if depth >= MAX_DEPTH => Err(invalid("", Problem::TooDeep)),
            Kind::Object => self.object(depth + 1),
            Kind::Array => self.array(depth + 1),
            Kind::String | Kind::Number | Kind::Bool | Kind::Null => self.leaf(kind),
        }
    }

    fn object(&mut self, depth: usize) -> Result<Shape, ClaimError> {
        let first = self.seen.len();
        self.cursor.enter();
        self.payload.push(b'{');
        while let Some((written, name)) = self.name(first)? {
            if self.seen.len() > first {
                self.payload.push(b',');
            }
            self.payload.extend_from_slice(written.text().as_bytes());
            self.payload.push(b':');
            let shape = self.value(depth).map_err(|error| error.within(Step::Member(&name)))?;
            self.seen.push(Member { name, shape });
        }
        self.payload.push(b'}');
        let empty = self.seen.len() == first;
        self.seen.truncate(first);
        Ok(Shape { kind: Kind::Object, empty, strings: false })
    }

    fn array(&mut self, depth: usize) -> Result<Shape, ClaimError> {
        let mut all = Shape { kind: Kind::Array, empty: true, strings: true };
        let mut index = 0;
        self.cursor.enter();
        self.payload.push(b'[');
        while self.cursor.next_item() {
            if index > 0 {
                self.payload.push(b',');
            }
            let element = self.value(depth).map_err(|error| error.within(Step::Element(index)))?;
            all.empty &= element.empty;
            all.strings &= element.kind == Kind::String;
            index += 1;
        }
        self.payload.push(b']');
        Ok(all)
    }

    fn leaf(&mut self, kind: Kind) -> Result<Shape, ClaimError> {
        let leaf = self.cursor.leaf();
        let empty = match kind {
            Kind::String => leaf.string().ok_or_else(|| invalid("", Problem::NotUnicode))?.trim().is_empty(),
            Kind::Number if !fits_a_double(leaf.text()) => return Err(invalid("", Problem::NumberTooLarge)),
            _ => kind == Kind::Null,
        };
        self.payload.extend_from_slice(leaf.text().as_bytes());
        Ok(Shape { kind, empty, strings: false })
    }
}

impl Given<'_> {
    fn has(&self, claim: &str) -> bool {
        self.members.iter().any(|member| member.name == claim && !member.shape.empty)
    }
}

/// One step of a path to a claim.
enum Step<'n> {
    Member(&'n str),
    Element(usize),
}

impl fmt::Display for Step<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Step::Member(name) => write!(f, ".{}", PathName(name)),
            Step::Element(index) => write!(f, "[{index}]"),
        }
    }
}

/// A claim's name in a path: as it is if that reads well, otherwise quoted, escaped and cut.
struct PathName<'n>(&'n str);

impl fmt::Display for PathName<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = |c: char| c.is_alphanumeric() || matches!(c, '_' | '-' | ':' | '/');
        if !self.0.is_empty() && self.0.chars().count() <= Quoted::SHOWN && self.0.chars().all(plain) {
            f.write_str(self.0)
        } else {
            write!(f, "{}", Quoted::new(self.0))
        }
    }
}

/// Refuses what only the daemon may say, and names that a verifier which ignores case would take for a registered
/// claim: Go's encoding/json does, and lets the last one win.
fn refuse_daemons_own(name: &str) -> Result<(), ClaimError> {
    if matches!(name, "iss" | "iat") {
        return Err(ClaimError::SetByDaemon { path: Step::Member(name).to_string() });
    }
    match REGISTERED.into_iter().find(|claim| folds_to(name, claim) && name != *claim) {
        Some(claim) => Err(invalid(&Step::Member(name).to_string(), Problem::Lookalike(claim))),
        None => Ok(()),
    }
}

/// The types that RFC 7519 §4.1, RFC 8693 §4, RFC 9068 §2.2 and OIDC Core §2 give to claims.
fn check_types(given: &Given<'_>) -> Result<(), ClaimError> {
    for Member { name, shape } in &given.members {
        let problem = match &**name {
            "sub" | "scope" | "client_id" | "azp" | "nonce" | "acr" if shape.kind != Kind::String => Problem::NotString,
            "auth_time" if shape.kind != Kind::Number => Problem::NotNumber,
            "amr" if !shape.strings => Problem::NotStrings,
            _ => continue,
        };
        return Err(invalid(&format!("claims.{name}"), problem));
    }
    Ok(())
}

/// The audiences that a string or an array of strings names (RFC 7519 §4.1.3).
fn parse_audiences(aud: Json<'_>) -> Result<Vec<Cow<'_, str>>, ClaimError> {
    let wrong = |problem| invalid("claims.aud", problem);
    let (mut audiences, mut cursor) = (Vec::new(), aud.walk());
    let mut more = match aud.kind() {
        Kind::String => true,
        Kind::Array => {
            cursor.enter();
            cursor.next_item()
        }
        Kind::Null | Kind::Bool | Kind::Number | Kind::Object => false,
    };
    if !more {
        return Err(wrong(Problem::NotAudience));
    }
    while more {
        let Some(audience) = cursor.leaf().string().filter(|audience| !audience.trim().is_empty()) else {
            return Err(wrong(Problem::NotAudience));
        };
        if audiences.contains(&audience) {
            return Err(wrong(Problem::RepeatedAudience));
        }
        if audiences.len() == MAX_AUDIENCES {
            return Err(wrong(Problem::TooManyAudiences));
        }
        audiences.push(audience);
        more = aud.kind() == Kind::Array && cursor.next_item();
    }
    Ok(audiences)
}

fn parse_ttl(ttl: Json<'_>) -> Result<Ttl<'_>, ClaimError> {
    let whole = |span: &Span| span.as_millis() % 1000 == 0;
    let secs = match ttl.kind() {
        // Mostly it is digits alone.
        Kind::Number => ttl.whole_number().or_else(|| whole_number_of_seconds(ttl)),
        Kind::String => ttl.string().and_then(|text| Span::parse(&text).ok()).filter(whole).map(Span::as_secs),
        Kind::Null | Kind::Bool | Kind::Array | Kind::Object => {
            return Err(malformed("the member `ttl` must be a duration like \"10m\" or a number of seconds"));
        }
    };
    match secs {
        Some(secs) if secs >= 1 => Ok(Ttl { secs, written: ttl.text() }),
        _ => Err(ClaimError::TtlInvalid { ttl: Quoted::brief(ttl.text()) }),
    }
}

/// A number with a fraction or an exponent.
fn whole_number_of_seconds(ttl: Json<'_>) -> Option<i64> {
    Span::from_json_seconds(ttl.text().parse().ok()?).map(Span::as_secs)
}

fn parse_typ(typ: Json<'_>) -> Result<Cow<'_, str>, ClaimError> {
    typ.string().ok_or_else(|| malformed("the member `typ` must be a string"))
}

fn parse_jti(jti: Json<'_>) -> Result<Cow<'_, str>, ClaimError> {
    jti.string()
        .filter(|jti| !jti.trim().is_empty() && jti.chars().count() <= MAX_JTI_CHARS)
        .ok_or_else(|| invalid("claims.jti", Problem::NotTokenId))
}

fn whole_seconds(path: &str, value: Json<'_>) -> Result<i64, ClaimError> {
    value.whole_number().ok_or_else(|| invalid(path, Problem::NotWholeSeconds))
}

/// Adds the daemon's claims, which stand behind the caller's: `iss` is in front.
fn finish(mut payload: Vec<u8>, times: &Times, jti: &str) -> Result<Vec<u8>, ClaimError> {
    for (name, value) in [(",\"iat\":", times.iat), (",\"nbf\":", times.nbf), (",\"exp\":", times.exp)] {
        payload.extend_from_slice(name.as_bytes());
        serde_json::to_writer(&mut payload, &value).expect("a number can always be written to memory");
    }
    payload.extend_from_slice(b",\"jti\":");
    push_string(&mut payload, jti);
    payload.push(b'}');
    if payload.len() > MAX_PAYLOAD_BYTES { Err(invalid("claims", Problem::TooLarge)) } else { Ok(payload) }
}

fn push_string(json: &mut Vec<u8>, text: &str) {
    serde_json::to_writer(json, text).expect("a string can always be written to memory");
}

/// A name without its case, Unicode's oddities included (`ſ` is an `s`, the Kelvin sign a `k`): readers that ignore
/// case fold these too.
fn fold(name: &str) -> String {
    folded(name).collect()
}

fn folds_to(name: &str, fold: &str) -> bool {
    if name.is_ascii() { name.eq_ignore_ascii_case(fold) } else { folded(name).eq(fold.chars()) }
}

fn folded(name: &str) -> impl Iterator<Item = char> {
    name.chars().flat_map(char::to_uppercase).flat_map(char::to_lowercase)
}

/// `at+jwt` of `application/at+jwt`: they are the same type (RFC 7515 §4.1.9).
fn subtype(typ: &str) -> &str {
    const PREFIX: &str = "application/";
    match typ.split_at_checked(PREFIX.len()) {
        Some((prefix, rest)) if prefix.eq_ignore_ascii_case(PREFIX) && !rest.contains('/') => rest,
        _ => typ,
    }
}

/// Without an exponent it takes more than 308 digits not to.
fn fits_a_double(number: &str) -> bool {
    let suspect = number.len() > 300 || number.bytes().any(|b| matches!(b, b'e' | b'E'));
    !suspect || number.parse::<f64>().is_ok_and(f64::is_finite)
}

/// What could garble a log or a terminal, or hide in it.
fn escape_invisible(c: char) -> impl Iterator<Item = char> {
    let invisible = c.is_control()
        || matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
    let (plain, escaped) = if invisible { (None, Some(c.escape_unicode())) } else { (Some(c), None) };
    plain.into_iter().chain(escaped.into_iter().flatten())
}

/// Only the kind of fault and its place: serde_json's own words for others may quote the text.
fn not_json(error: &serde_json::Error) -> ClaimError {
    let what = if error.is_eof() { "the JSON ends too early" } else { "it is not JSON" };
    malformed(&format!("{what}, at line {} column {}", error.line(), error.column()))
}

fn malformed(detail: &str) -> ClaimError {
    ClaimError::Malformed { detail: detail.to_owned() }
}

fn invalid(path: &str, problem: Problem) -> ClaimError {
    ClaimError::Invalid { path: path.to_owned(), problem }
}
